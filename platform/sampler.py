"""
Which samples each rank sees in each step: a pure function of (seed, epoch, step, world).

Nothing is remembered between steps, so a replaced worker, a resumed run and a test all ask the
same question and get the same answer (invariant I2). A batch is a run of the epoch's permutation;
a rank's part is a run of the batch; a micro-batch is a run of the part:

    epoch    | batch 0            | batch 1            | batch 2      |   last one may be short
    batch 1  | rank 0  | rank 1   | rank 2  |                             sizes differ by at most 1
    rank 0   | micro 0 | micro 1  |                                       sizes differ by at most 1

so that the ranks' parts are disjoint, complete, and the same union for every world.

A stream is read over and over, so its samples are numbered on from pass to pass; an epoch is a
pass. One whose length is not known has no epochs that could end: all its batches are whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from distplat.platform.even_split import split_evenly

ENDLESS = 1 << 53
"""Samples of a stream of which no length is known; every program reads the number exactly."""


@dataclass(frozen=True)
class Sampler:
    """
    The order of one run's training samples.

    Raises:
        ValueError: the data set is empty, or smaller than one batch with `drop_last`.
    """

    size: int
    """Samples of an epoch: all of the data set, unless the task gives their order."""
    batch: int
    """Samples of one step over all ranks."""
    world: int
    """Ranks."""
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    """Leave out an epoch's last batch where it is short."""
    order: Callable[[int], NDArray[np.int64]] | None = None
    """Gives the sample ids of an epoch, shape [size], the same for the same epoch; None: all of
    them, as `seed` and `shuffle` say."""
    stream: bool = False
    """Take the samples as they come: those of epoch e are numbered from e * size."""

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training data has {self.size} samples: no batch of {self.batch} fits"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the data."""
        whole, rest = divmod(self.size, self.batch)
        return whole + (rest > 0 and not self.drop_last)

    def epoch_of(self, step: int) -> int:
        """Give the pass over the data to which a step belongs, from 0."""
        return step // self.steps_per_epoch

    def batch_ids(self, step: int) -> NDArray[np.int64]:
        """Give the sample ids of a step over all ranks, shape [<= batch]."""
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
        """Give the number of a step's first sample in a stream."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch * self.size + index * self.batch

    @property
    def endless(self) -> bool:
        """Whether it is a stream of which no length is known."""
        return self.stream and self.size == ENDLESS

    def batch_size(self, step: int) -> int:
        """Count the samples of a step over all ranks, without making them."""
        index = step % self.steps_per_epoch
        return min(self.batch, self.size - index * self.batch)

    def rank_ids(self, step: int, rank: int) -> NDArray[np.int64]:
        """Give the sample ids of one rank's part of a step; may be empty in a short batch."""
        start, stop = split_evenly(self.batch_size(step), self.world)[rank]
        return self.batch_ids(step)[start:stop]

    def first_position(self, step: int, rank: int) -> int:
        """Give the position in the epoch's order where a rank's part of a step begins."""
        index = step % self.steps_per_epoch
        return index * self.batch + split_evenly(self.batch_size(step), self.world)[rank][0]

    def micro_batches(self, step: int, rank: int, parts: int) -> list[NDArray[np.int64]]:
        """Cut a rank's part of a step into at most `parts` runs, none of them empty."""
        ids = self.rank_ids(step, rank)
        return [ids[a:b] for a, b in split_evenly(len(ids), min(parts, len(ids)) or 1) if b > a]


@lru_cache(
    maxsize=2
)  # an epoch's order is asked for at every step; a loader reads ahead into the next
def _order(size: int, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """Give the order of one epoch, shape [size]. Philox: its stream is the same on any machine."""
    if not shuffle:
        order = np.arange(size, dtype=np.int64)
    else:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
        order = generator.permutation(size).astype(np.int64, copy=False)
    order.setflags(write=False)
    return order
