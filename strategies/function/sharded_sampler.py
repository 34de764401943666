"""
Split the order of a loader's custom sampler, or the batches of a custom `batch_sampler`, by rank.

A sampler that already yields only this rank's part, such as `DistributedSampler`, is used
unchanged.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.algorithms.seeds import order_seed
from distplat.strategies.collective import Collective, mismatched_ranks
from distplat.strategies.loop.sample_hash import fingerprint_of
from distplat.strategies.loop.seeding import preserve_rng_state, seed_quickly
from distplat.strategies.loop.streams import length_of

_MAX_LENGTH_FACTOR = 100
"""
Limit of a `batch_sampler`'s length, as a multiple of its expected batches or of the samples: it may
never end.
"""
_ALLOWED_LENGTH = 10_000_000
"""Length of a pass that is always allowed; a list of as many integers takes 0.4 GB."""


class ShardedSampler(DistributedSampler[Any]):
    """
    Splits another sampler's order as `DistributedSampler` splits a data set.

    Every rank iterates over the whole order. The wrapped sampler draws from the global generators,
    which are seeded by the epoch, so the order is the same on all ranks and after a restart.

    Args:
        wrapped: the user's sampler.
        rank: this rank.
        world: number of ranks.
        seed: the job's seed.
        drop_last: drop the remainder, instead of repeating samples.

    Raises:
        SpecError: The sampler has no length, or yields another order in each iteration.
    """

    def __init__(
        self, wrapped: Iterable[Any], rank: int, world: int, seed: int, *, drop_last: bool
    ) -> None:
        self.wrapped: Any = wrapped
        """The user's sampler."""
        self._name = type(wrapped).__name__
        indices: Any = range(self._length())  # DistributedSampler only uses the length
        super().__init__(indices, world, rank, shuffle=True, seed=seed, drop_last=drop_last)
        self.dataset: Any = wrapped
        self.size = len(indices)
        """Length of the last drawn order, of all ranks."""
        self.epoch: int = LoaderEpoch(epoch_of(wrapped))
        self.fingerprint = fingerprint_of(_hashable(self._order()))
        """Fingerprint of the order of the last pass that was started."""
        if self.fingerprint != fingerprint_of(_hashable(self._order())):
            text = f"{self._name}, which yields another order in each iteration of one epoch"
            hint = (
                "draw from the global generators, which are seeded before each pass (do not pass "
                "`generator` to torch's samplers), or seed its generator in set_epoch(epoch)"
            )
            raise _error(text, hint)

    @override
    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        self.fingerprint = fingerprint_of(_hashable(order))
        repeated = order * math.ceil(self.total_size / max(1, len(order)))
        return iter(repeated[self.rank : self.total_size : self.num_replicas])

    def _order(self) -> list[Any]:
        """Return the epoch's order, of all ranks."""
        set_sampler_epoch(self.wrapped, self.epoch)
        with preserve_rng_state():
            seed_quickly(order_seed(self.seed, self.epoch))
            return self._draw()

    def _length(self) -> int:
        """Return the length that the user's sampler reports."""
        return _require_length(self.wrapped)

    def _draw(self) -> list[Any]:
        """
        Draw an order from the user's sampler.

        Raises:
            SpecError: Its length differs from the sampler's `len`, or from the previous length.
        """
        length = self._length()
        order = [_copy_item(item) for item in itertools.islice(self.wrapped, length + 1)]
        if len(order) != length:
            count = f"{len(order)} or more" if len(order) > length else len(order)
            text = f"{self._name}, which yields {count} samples and whose length is {length}"
            raise _error(text, "return the same number from its __len__")
        if length != self.size:
            text = f"{self._name}, which yields {length} samples now, and had {self.size} when"
            hint = "prepare a loader of each length, and call its set_epoch(epoch)"
            raise _error(f"{text} it was prepared", hint)
        return order


class ShardedBatches(ShardedSampler):
    """
    Splits the batches of a `batch_sampler`: rank r of N gets the batches r, r + N, r + 2N, ...

    Passes may have different numbers of batches, and `__len__` may be missing.

    Args:
        wrapped: the user's batch sampler.
        samples: length of the data set; None: unknown.
        rank: see `ShardedSampler`.
        world: see `ShardedSampler`.
        seed: see `ShardedSampler`.
        drop_last: see `ShardedSampler`.

    Raises:
        SpecError: The batch sampler never ends, or yields other batches in each iteration.
    """

    def __init__(
        self,
        wrapped: Iterable[Any],
        samples: int | None,
        rank: int,
        world: int,
        seed: int,
        *,
        drop_last: bool,
    ) -> None:
        self._samples = samples
        super().__init__(wrapped, rank, world, seed, drop_last=drop_last)

    @property
    def sampler(self) -> ShardedBatches:
        """
        This object: loops may call `batch_sampler.sampler.set_epoch`, as with torch's
        `BatchSampler`.
        """
        return self

    @override
    def __len__(self) -> int:
        if self._drawn_epoch != self.epoch:  # e.g. for a schedule that is built before the pass
            self._order()
        return super().__len__()

    @override
    def _length(self) -> int:
        return length_of(self.wrapped) or 0

    @override
    def _draw(self) -> list[Any]:
        expected = self._length() or self._samples
        limit = _MAX_LENGTH_FACTOR * max(
            1, _require_length(self.wrapped) if expected is None else expected
        )
        order = [
            _copy_item(batch) if hasattr(batch, "__len__") else [*batch]
            for batch in itertools.islice(self.wrapped, limit + 1)
        ]
        if len(order) > limit:
            text = f"{self._name}, which yields more than {limit} batches in a pass"
            raise _error(text, "end its __iter__, and return the number of batches from __len__")
        self._drawn_epoch, self.size, world = int(self.epoch), len(order), self.num_replicas
        self.num_samples = self.size // world if self.drop_last else -(-self.size // world)
        self.total_size = self.num_samples * world
        return order


class RankSampler(DistributedSampler[Any]):
    """
    Wraps a sampler, or a `batch_sampler`, that already yields only this rank's part.

    Args:
        wrapped: the user's sampler.
        rank_sampler: the object with `rank` and `num_replicas`, see `find_rank_sampler`.

    Raises:
        SpecError: The sampler has no length.
    """

    def __init__(self, wrapped: Any, rank_sampler: Any) -> None:
        self.wrapped: Any = wrapped
        """The user's sampler."""
        indices: Any = range(_require_length(wrapped) * rank_sampler.num_replicas)
        super().__init__(indices, rank_sampler.num_replicas, rank_sampler.rank, shuffle=False)
        self.epoch = epoch_of(wrapped)

    @property
    def sampler(self) -> RankSampler:
        """See `ShardedBatches`."""
        return self

    @override
    def __iter__(self) -> Iterator[Any]:
        yield from self.wrapped  # lazily, because loaders create two iterators

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        set_sampler_epoch(self.wrapped, epoch)
        self.num_samples = _require_length(self.wrapped)
        self.total_size = self.num_samples * self.num_replicas
        indices: Any = range(self.total_size)
        self.dataset = indices


def find_rank_sampler(sampler: Any, rank: int, world: int) -> Any:
    """
    Return the object that splits by rank: the sampler or its own `sampler`; None: neither does.

    A sampler for a single rank yields the whole order, and is split like any other.

    Raises:
        SpecError: It is configured for another rank, or for another number of ranks.
    """
    for candidate in (sampler, getattr(sampler, "sampler", None)):
        numbers = getattr(candidate, "rank", None), getattr(candidate, "num_replicas", None)
        if all(isinstance(number, int) for number in numbers):
            if numbers == (0, 1) and world > 1:
                return None
            if numbers != (rank, world):
                text = f"{type(candidate).__name__} of rank {numbers[0]}, num_replicas {numbers[1]}"
                hint = (
                    "create it with get_world_rank() and get_world_size() of "
                    "distplat.get_context(), or with rank 0 and num_replicas 1: prepare() then "
                    "splits the order"
                )
                raise _error(f"{text}, on rank {rank} of {world} workers", hint)
            return candidate
    return None


class LoaderEpoch(int):
    """
    An epoch set by a prepared loader. The type tells it from an equal number set by the user's
    loop.
    """


def check_single_pass(sampler: Any, samples: int | None, counted: str) -> None:
    """
    Check that a sampler's length is that of a single pass, because every rank draws all of it at
    once.

    A loop without epochs may use ``num_samples=int(1e10)``.

    Args:
        sampler: the user's sampler.
        samples: length of the data set; None: unknown.
        counted: what the sampler yields, samples or batches.

    Raises:
        SpecError: The length is that of many passes; the message suggests a remedy.
    """
    length = length_of(sampler)
    if length is None or length <= max(_ALLOWED_LENGTH, _MAX_LENGTH_FACTOR * (samples or 0)):
        return
    over = "" if samples is None else f" over {samples} samples"
    text = f"{type(sampler).__name__}, which yields {length} {counted} in a pass{over}"
    hint = (
        "set its num_samples to one pass, and iterate over the loader again when a pass ends; or "
        "do not prepare the loader, if each rank draws its own samples"
    )
    raise _error(text, hint)


def epoch_state(sampler: Any) -> tuple[type, int] | None:
    """Return a sampler's epoch with its type, which changes if `set_epoch` is called."""
    epoch = getattr(_find_set_epoch(sampler), "epoch", None)
    return (type(epoch), epoch) if isinstance(epoch, int) else None


def epoch_of(sampler: Any) -> int:
    """Return a sampler's epoch; 0: it has none."""
    state = epoch_state(sampler)
    return int(state[1]) if state is not None else 0


def set_sampler_epoch(sampler: Any, epoch: int) -> None:
    """Set the epoch of a sampler's next pass, if the sampler supports it."""
    if (target := _find_set_epoch(sampler)) is not None:
        target.set_epoch(epoch)


def _find_set_epoch(sampler: Any) -> Any:
    """Return the object with `set_epoch`, a sampler or its own `sampler`; None: neither."""
    samplers = sampler, getattr(sampler, "sampler", None)
    return next((s for s in samplers if callable(getattr(s, "set_epoch", None))), None)


def check_order(sampler: ShardedSampler, group: Collective, device: torch.device) -> None:
    """
    Check that all ranks have the same order; every rank calls this.

    Raises:
        SpecError: The message names the ranks whose order differs from rank 0's.
    """
    if ranks := mismatched_ranks(sampler.fingerprint, group, device):
        names = ", ".join(map(str, ranks))
        text = f"sampler that yields another order on rank {names} than on rank 0"
        hint = (
            "yield the order of all samples, the same on all ranks; a sampler that splits by rank "
            "itself is used unchanged if it has the attributes rank and num_replicas"
        )
        raise _error(text, hint)


def _require_length(sampler: Any) -> int:
    if (length := length_of(sampler)) is None:
        raise _error(f"{type(sampler).__name__}, which has no length", "implement its __len__")
    return length


def _copy_item(item: Any) -> Any:
    """Copy an item of a sampler, which may reuse one list or array for all items."""
    if isinstance(item, int):
        return item
    return item.clone() if isinstance(item, Tensor) else copy.copy(item)


def _hashable(order: list[Any]) -> Any:
    """Convert an order, of samples or of batches, to a form that can be hashed quickly."""
    if order and all(isinstance(item, list | tuple) for item in order):
        lengths = np.fromiter(map(len, order), np.int64, len(order))
        return [lengths, _hashable([*itertools.chain(*order)])]
    is_integer = all(isinstance(item, int | np.integer) for item in order)
    return np.asarray(order, np.int64) if is_integer else order


def _error(what: str, hint: str) -> SpecError:
    text = f"prepare() got a DataLoader with a {what}"
    return SpecError(Problem(("task",), text, hint))
