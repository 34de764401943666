"""
A worker's parameters, shown to others while it trains.

    somebody asks ──▶ wanted          training thread: the step under way ends
                                      ──▶ copies the parameters, if they are wanted
    asks again    ◀── that copy

The copy is made between two steps by the thread that trains, so it is of one version, and only when
somebody asked, so a run that nobody looks at pays nothing. Of a model that is cut, whoever asks
wants the same version of every part: so one may be asked for beforehand (`exactly`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from distplat.platform.tensor_slices import Bundle
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
from distplat.strategies.checkpoint.parts import Staging

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot(Generic[T]):
    """What a worker has after so many steps."""

    version: int
    content: T


class SnapshotPublisher(Generic[T]):
    """Publishes a worker's parameters: any thread asks, the one that trains offers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False
        self._exactly: set[int] = set()  #: versions that are wanted, and no other
        self._passed = 0  #: the last version that was offered
        self._latest: Snapshot[T] | None = None

    def offer(self, version: int, copy: Callable[[], T], *, last: bool = False) -> None:
        """
        Copy what has `version` steps behind it, if somebody asked.

        Args:
            version: steps.
            copy: makes the copy.
            last: no later version will come: it is copied for whoever asks then.
        """
        with self._lock:
            self._exactly = {wanted for wanted in self._exactly if wanted >= version}
            if not (self._wanted or last or version in self._exactly):
                self._passed = version
                return
        snapshot = Snapshot(version, copy())
        with self._lock:
            self._latest, self._wanted, self._passed = snapshot, False, version

    def ask(self, at_least: int) -> Snapshot[T] | None:
        """Give a copy of this version or a later one; None: it is wanted, ask again."""
        with self._lock:
            if self._latest is not None and self._latest.version >= at_least:
                return self._latest
            self._wanted = True
            return None

    def exactly(self, version: int) -> tuple[int, Snapshot[T] | None]:
        """
        Give a copy of this version; None: it is wanted, ask again if it is not past.

        Returns:
            The last version that was offered, and the copy.
        """
        with self._lock:
            if self._latest is not None and self._latest.version == version:
                return self._passed, self._latest
            if version > self._passed:
                self._exactly.add(version)
            return self._passed, None


def state_copy(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's parameters and buffers, to the CPU."""
    whole = {"memory_format": torch.contiguous_format}
    return {n: value.detach().cpu().clone(**whole) for n, value in model.state_dict().items()}


def part_copy(part: CheckpointPart) -> Bundle:
    """Copy a part of a model, with where it belongs."""
    return Staging().copy(part.tensors), part.entries
