"""
Which samples each rank gets in each step: a pure function of (seed, epoch, step, world).

The sampler keeps no state between steps, so a replaced worker, a resumed run and a test get the
same samples (invariant I2). A batch is a range of the epoch's permutation; a rank's part is a range
of the batch; a micro-batch is a range of the part:

    epoch    | batch 0            | batch 1            | batch 2      |   the last may be short
    batch 1  | rank 0  | rank 1   | rank 2  |                             sizes differ by at most 1
    rank 0   | micro 0 | micro 1  |                                       sizes differ by at most 1

The ranks' parts are disjoint and complete, and their union is the same for every world.

A stream is read repeatedly, so sample numbers continue from pass to pass; an epoch is a pass. A
stream of unknown length has no epochs: all its batches are complete.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from distplat.platform.even_split import split_evenly

ENDLESS = 1 << 53
"""Size of a stream of unknown length; a float holds it exactly."""


@dataclass(frozen=True)
class Sampler:
    """
    Order of one run's training samples.

    Raises:
        ValueError: the data set is empty, or smaller than one batch with `drop_last`.
    """

    size: int
    """Samples per epoch: the whole data set, unless the task defines the order."""
    batch: int
    """Samples per step over all ranks."""
    world: int
    """Number of ranks."""
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    """Drop an epoch's last batch if it is short."""
    order: Callable[[int], NDArray[np.int64]] | None = None
    """Returns the sample ids of an epoch, shape [size], the same for the same epoch; None: all
    samples, as `seed` and `shuffle` define."""
    stream: bool = False
    """Read samples in order: epoch e starts at sample e * size."""

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training data has {self.size} samples: no batch of {self.batch} fits"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one pass over the data."""
        full, rest = divmod(self.size, self.batch)
        return full + (rest > 0 and not self.drop_last)

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step, from 0."""
        return step // self.steps_per_epoch

    def batch_ids(self, step: int) -> NDArray[np.int64]:
        """Return the sample ids of a step over all ranks, shape [<= batch]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.stream:
            first = self.position(step)
            return np.arange(first, first + self.batch_size(step), dtype=np.int64)
        if self.order is not None:
            order = self.order(epoch)
        else:
            order = _order(self.size, self.seed, epoch, self.shuffle)
        return order[index * self.batch : (index + 1) * self.batch]

    def position(self, step: int) -> int:
        """Return the number of a step's first sample in a stream."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch * self.size + index * self.batch

    @property
    def endless(self) -> bool:
        """Whether the data is a stream of unknown length."""
        return self.stream and self.size == ENDLESS

    def batch_size(self, step: int) -> int:
        """Return the number of samples of a step over all ranks, without computing their ids."""
        index = step % self.steps_per_epoch
        return min(self.batch, self.size - index * self.batch)

    def rank_ids(self, step: int, rank: int) -> NDArray[np.int64]:
        """Return the sample ids of one rank's part of a step; may be empty in a short batch."""
        start, stop = split_evenly(self.batch_size(step), self.world)[rank]
        return self.batch_ids(step)[start:stop]

    def first_position(self, step: int, rank: int) -> int:
        """Return the position in the epoch's order where a rank's part of a step starts."""
        index = step % self.steps_per_epoch
        return index * self.batch + split_evenly(self.batch_size(step), self.world)[rank][0]

    def micro_batches(self, step: int, rank: int, parts: int) -> list[NDArray[np.int64]]:
        """Split a rank's part of a step into at most `parts` ranges, none of them empty."""
        ids = self.rank_ids(step, rank)
        return [ids[a:b] for a, b in split_evenly(len(ids), min(parts, len(ids)) or 1) if b > a]


@lru_cache(maxsize=2)  # used at every step; a loader prefetches from the next epoch
def _order(size: int, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """Return the order of one epoch, shape [size]; Philox is the same on every platform."""
    if not shuffle:
        order = np.arange(size, dtype=np.int64)
    else:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
        order = generator.permutation(size).astype(np.int64, copy=False)
    order.setflags(write=False)
    return order
