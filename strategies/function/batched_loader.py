"""
A DataLoader with a `batch_sampler` of its own, of which each rank gets its part of the batches.

    batch_sampler  [3 5] [0 1 4] [2] [6 7] [8]      2 ranks
    rank 0         [3 5]         [2]       [8]
    rank 1               [0 1 4]     [6 7] [3 5]    the first ones again: all have as many
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from distplat.strategies.function.dealt_sampler import (
    DealtBatches,
    RankSampler,
    check_ends,
    dealer_in,
)
from distplat.strategies.function.sharded_loader import NumberedLoader
from distplat.strategies.loop.streams import length_of


class BatchedLoader(NumberedLoader):
    """
    Of a map-style data set whose batches a `batch_sampler` makes.

    One that deals out by rank itself is taken as it is. See `NumberedLoader` for the arguments.
    """

    counted = "batches"

    @property
    @override
    def batch_sampler(self) -> DistributedSampler[Any]:
        """What gives this rank's batches; has `set_epoch`, and so has its `sampler`."""
        return self.sampler

    @override
    def _sampler_of(self, loader: DataLoader[Any]) -> DistributedSampler[Any]:
        given: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        rank, world, seed = self._cut
        if (dealer := dealer_in(given, rank, world)) is not None:
            return RankSampler(given, dealer)
        samples = length_of(self.dataset)
        check_ends(given, samples, self.counted)
        drops = bool(getattr(given, "drop_last", False))
        return DealtBatches(given, samples, rank, world, seed, drop_last=drops)

    @override
    def _batches_of(self, loader: DataLoader[Any]) -> Any:
        return self._order

    @override
    def described(self) -> str:
        return f"a batch of the batch_sampler on each of {self._cut.world} workers in a step"

    @property
    @override
    def _of_a_step(self) -> int:
        return self._cut.world

    @override
    def _parts(self, passed: int) -> str:
        return (
            f"no step begins of {self._cut.world} workers with a batch each: take a number of "
            f"workers of which {passed} is a multiple"
        )

    @override
    def _own(self, number: int, size: int, whole: int) -> int:
        return size if number < whole else 0
