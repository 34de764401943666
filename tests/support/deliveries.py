"""Checkpoint parts delivered by ranks, and a full disk."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distplat.actors.actor_group import Launch
from distplat.actors.checkpointing import Checkpoints
from distplat.platform.checkpoints import Delivery
from distplat.platform.disk import Disk
from distplat.platform.tensor_slices import TensorEntry, TensorSlice


def delivery(rank: int, version: int, attempt: int = 0, **more: Any) -> Delivery:
    entry = TensorEntry("model/w", TensorSlice((2,), run=(rank, rank + 1)), "uint8", 0)
    ref = [np.array([10 * version + rank], np.uint8)]
    return Delivery(rank, attempt, version, (ref,), ((entry,),), **more)


def deliver(checkpoints: Checkpoints, *versions: int) -> None:
    """Deliver the parts of both ranks of some versions."""
    for version in versions:
        for rank in range(2):
            checkpoints.take(delivery(rank, version))
        checkpoints.drain()


class FullDisk(Disk):
    """A disk whose writes fail while `full` is set."""

    full = True

    def write(self, path: Path, content: Any) -> tuple[int, str]:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return super().write(path, content)


def with_storage_timeout(launch: Launch, limit_s: float) -> Launch:
    """Return a copy of the launch with another `storage_timeout_s`."""
    failure = launch.job.failure.model_copy(update={"storage_timeout_s": limit_s})
    return replace(launch, job=launch.job.model_copy(update={"failure": failure}))
