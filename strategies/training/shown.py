"""
A worker's parameters, shown to others while it trains.

    somebody asks ──▶ wanted          training thread: the step under way ends
                                      ──▶ copies the parameters, if they are wanted
    asks again    ◀── that copy

The copy is made between two steps by the thread that trains, so it is of one version, and only when
somebody asked, so a run that nobody looks at pays nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Copy:
    """A model's state after so many steps."""

    version: int
    state: dict[str, Tensor]


class Shown:
    """What a worker shows; asked by any thread, offered to by the one that trains."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False
        self._latest: Copy | None = None

    def offer(self, version: int, model: nn.Module) -> None:
        """Copy the model, which has `version` steps behind it, if somebody asked."""
        if not self._wanted:
            return
        whole = {"memory_format": torch.contiguous_format}
        state = {n: value.detach().cpu().clone(**whole) for n, value in model.state_dict().items()}
        with self._lock:
            self._latest, self._wanted = Copy(version, state), False

    def ask(self, at_least: int) -> Copy | None:
        """Give a copy of this version or a later one; None: it is wanted, ask again."""
        with self._lock:
            if self._latest is not None and self._latest.version >= at_least:
                return self._latest
            self._wanted = True
            return None
