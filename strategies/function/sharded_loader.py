"""A DataLoader of a train function, with this rank's part of the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.loop.collate import moved

_KEPT = (
    "batch_size",
    "collate_fn",
    "num_workers",
    "pin_memory",
    "drop_last",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)


class ShardedLoader:
    """
    Gives a rank's batches, on its device; what `prepare` makes of a DataLoader.

    Each pass over it is another epoch of its sampler, unless `set_epoch` says which.

    Args:
        loader: the user's, whose sampler is plain, random or distributed already.
        rank: this one.
        world: ranks.
        seed: of the order.
        device: where batches go.
        read: told the samples of each batch, the seconds that were waited for it, the epoch, and
            how many of the samples are no repetition.

    Raises:
        SpecError: a loader that cannot be cut into parts; says what to do.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        rank: int,
        world: int,
        seed: int,
        device: torch.device,
        read: Callable[[int, float, int, int], None],
    ) -> None:
        self.sampler: DistributedSampler[Any] = _sampler_of(loader, rank, world, seed)
        kept = {name: getattr(loader, name) for name in _KEPT}
        self._loader: DataLoader[Any] = DataLoader(loader.dataset, sampler=self.sampler, **kept)
        self._device, self._read = device, read
        self._epoch = self._noted = self.sampler.epoch

    @property
    def dataset(self) -> Any:
        """The user's, whole."""
        return self._loader.dataset

    @property
    def batch_size(self) -> int:
        """Samples of this rank's batch."""
        return self._loader.batch_size or 1

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is: after a restart, for example."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if self.sampler.epoch != self._noted:  # the loop has told its own sampler
            self._epoch = self.sampler.epoch
        epoch, self._epoch = self._epoch, self._epoch + 1
        self.sampler.set_epoch(epoch)
        self._noted = epoch
        batches, left = iter(self._loader), self.sampler.num_samples
        own = self._own_samples()
        while True:
            began = time.perf_counter()
            try:
                batch = moved(next(batches), self._device)
            except StopIteration:
                return
            size = min(self.batch_size, left)
            left -= size
            self._read(size, time.perf_counter() - began, epoch, max(0, min(size, own)))
            own -= size
            yield batch

    def _own_samples(self) -> int:
        """Count this rank's samples of an epoch; those behind them are others' once more."""
        sampler = self.sampler
        size = len(self.dataset)
        return min(sampler.num_samples, -(-(size - sampler.rank) // sampler.num_replicas))


def _sampler_of(
    loader: DataLoader[Any], rank: int, world: int, seed: int
) -> DistributedSampler[Any]:
    given = loader.sampler
    if isinstance(loader.dataset, IterableDataset):
        raise _refused("reads an IterableDataset", "cut it by rank itself, and do not prepare it")
    if type(loader.batch_sampler) is not BatchSampler:
        raise _refused("has a batch_sampler of its own, or batch_size=None", "give batch_size")
    if isinstance(given, DistributedSampler):
        return given
    plain = type(given) is SequentialSampler
    if not plain and (type(given) is not RandomSampler or given.replacement):
        hint = "give shuffle=True or False, or a sampler that is a DistributedSampler"
        raise _refused(f"has a {type(given).__name__}, of which ranks have no parts", hint)
    size = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(given, RandomSampler) and given.num_samples != size:
        raise _refused("draws another number of samples than there are", "leave num_samples out")
    return DistributedSampler(
        loader.dataset, world, rank, shuffle=not plain, seed=seed, drop_last=loader.drop_last
    )


def _refused(what: str, hint: str) -> SpecError:
    return SpecError(Problem(("task",), f"prepare() got a DataLoader that {what}", hint))
