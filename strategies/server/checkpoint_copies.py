"""
A shard's copies for checkpoints: made at the moment a version is complete, given out later.

    version      119       120                 121   ...   140                ...   160
    params       changes   changes | copied    changes     changes | copied         120's are gone
                                     |
                                     `- fetched behind the training's back

All shards copy at the same version, whoever asks when; so the parts fit together (I3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from distplat.platform.checkpoints import is_due

_VERSIONS = 2


@dataclass(frozen=True)
class VectorCopies:
    """Independent copies of a shard's vectors; callers may modify them."""

    tensors: dict[str, Tensor]
    """By torch's names, shape [m] or none; the parameters under the empty name."""

    @classmethod
    def of(cls, params: Tensor, state: Mapping[str, Tensor]) -> VectorCopies:
        """
        Copy a shard.

        Args:
            params: shape [m].
            state: of its optimizer, by torch's names.
        """
        tensors = {"": params, **state}
        return cls({name: value.detach().clone() for name, value in tensors.items()})


T = TypeVar("T")


class CheckpointCopies(Generic[T]):
    """
    Copies a server's state when a checkpoint is due; holds the copies of the two newest versions.

    Two, for a synchronous rank waits for the copies of one checkpoint to leave when the next is
    due: by then the server has copied again.

    Args:
        every: steps between two checkpoints; 0: there are none.
        total_steps: of the run.
    """

    def __init__(self, every: int, total_steps: int) -> None:
        self._every, self._total = every, total_steps
        self._kept: dict[int, T] = {}  #: by version, the oldest first

    def reached(self, version: int, copy: Callable[[], T]) -> None:
        """Keep what `copy` gives if a checkpoint of this version is due."""
        if version > max(self._kept, default=-1) and is_due(version, self._every, self._total):
            self._kept[version] = copy()
            while len(self._kept) > _VERSIONS:
                del self._kept[min(self._kept)]

    def give(self, version: int) -> T | None:
        """Give the copies of a version, and forget them; None: they are not here."""
        return self._kept.pop(version, None)
