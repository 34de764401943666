"""
Loaders with a custom `batch_sampler`: each rank gets a part of the batches.

    batch_sampler  [3 5] [0 1 4] [2] [6 7] [8]      2 ranks
    rank 0         [3 5]         [2]       [8]
    rank 1               [0 1 4]     [6 7] [3 5]    the first batch is repeated, to have 3 each
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from distplat.strategies.function.sharded_loader import MapStyleLoader
from distplat.strategies.function.sharded_sampler import (
    RankSampler,
    ShardedBatches,
    check_single_pass,
    find_rank_sampler,
)
from distplat.strategies.loop.streams import length_of


class BatchSamplerLoader(MapStyleLoader):
    """
    A loader of a map-style data set with a custom `batch_sampler`.

    A `batch_sampler` that already yields this rank's part is used unchanged. See `MapStyleLoader`
    for the arguments.
    """

    counted = "batches"

    @property
    @override
    def batch_sampler(self) -> DistributedSampler[Any]:
        """The sampler of this rank's batches; it and its `sampler` have `set_epoch`."""
        return self.sampler

    @override
    def _sampler_of(self, loader: DataLoader[Any]) -> DistributedSampler[Any]:
        wrapped: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        rank, world, seed = self._shard
        if (rank_sampler := find_rank_sampler(wrapped, rank, world)) is not None:
            return RankSampler(wrapped, rank_sampler)
        samples = length_of(self.dataset)
        check_single_pass(wrapped, samples, self.counted)
        drops = bool(getattr(wrapped, "drop_last", False))
        return ShardedBatches(wrapped, samples, rank, world, seed, drop_last=drops)

    @override
    def _batches_of(self, loader: DataLoader[Any]) -> Any:
        return self._order

    @override
    def description(self) -> str:
        return f"a batch of the batch_sampler on each of {self._shard.world} workers in a step"

    @property
    @override
    def _step_size(self) -> int:
        return self._shard.world

    @override
    def _position_error(self, passed: int) -> str:
        return (
            f"is not the start of a step of {self._shard.world} workers with a batch each: use a "
            f"number of workers that divides {passed}"
        )

    @override
    def _unique(self, number: int, size: int, total: int) -> int:
        return size if number < total else 0
