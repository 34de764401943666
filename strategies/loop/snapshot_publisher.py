"""
Snapshots of a worker's parameters during training.

    reader: ask() ──▶ requested       training thread: finishes the current step,
                                      ──▶ copies the parameters if requested
    reader: ask() ◀── the snapshot

The training thread makes the copy between two steps, so a snapshot is of one version. It copies
only on request, so a run without readers has no overhead. Readers of a split model need the same
version of every part: `exactly` requests a version in advance.
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
    """A worker's state after `version` steps."""

    version: int
    content: T


class SnapshotPublisher(Generic[T]):
    """Publishes a worker's parameters: any thread requests, the training thread offers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False
        self._exactly: set[int] = set()  #: versions requested by `exactly`
        self._passed = 0  #: last offered version
        self._latest: Snapshot[T] | None = None

    def offer(self, version: int, copy: Callable[[], T], *, last: bool = False) -> None:
        """
        Publish a copy of the current version if it was requested.

        Args:
            version: number of steps.
            copy: makes the copy.
            last: whether this is the last version, which is copied for later requests.
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
        """Return a snapshot of this version or a later one; None: requested, call again."""
        with self._lock:
            if self._latest is not None and self._latest.version >= at_least:
                return self._latest
            self._wanted = True
            return None

    def exactly(self, version: int) -> tuple[int, Snapshot[T] | None]:
        """
        Request a snapshot of exactly this version.

        Returns:
            The last offered version, and the snapshot; None: not available yet, or, if the last
            offered version is `version` or later, never.
        """
        with self._lock:
            if self._latest is not None and self._latest.version == version:
                return self._passed, self._latest
            if version > self._passed:
                self._exactly.add(version)
            return self._passed, None


def state_copy(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's parameters and buffers to the CPU."""
    contiguous = {"memory_format": torch.contiguous_format}
    return {n: value.detach().cpu().clone(**contiguous) for n, value in model.state_dict().items()}


def part_copy(part: CheckpointPart) -> Bundle:
    """Copy a part of a model, with its entries."""
    return Staging().copy(part.tensors), part.entries
