"""
The order of a loader's own sampler, or the batches of its own `batch_sampler`: each rank's part.

One that deals out by rank itself gives this rank's part already, as `DistributedSampler` does.
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

_MANY = 100
"""Times the batches that it says, or the samples of the data set: a `batch_sampler` has no end."""
_LONG = 10_000_000
"""Numbers that are drawn for a pass in any case: as a list they take 0.4 GB."""


class DealtSampler(DistributedSampler[Any]):
    """
    Deals out what another sampler gives as `DistributedSampler` deals out a data set.

    Every rank goes through the whole order. What it draws comes from the global generators, seeded
    by the epoch: so all ranks have the same, and after a restart, too.

    Args:
        given: the user's.
        rank: this one's number.
        world: ranks.
        seed: of the job.
        drop_last: leave out what does not come out even.

    Raises:
        SpecError: it has no length, or another order each time that it is asked.
    """

    def __init__(
        self, given: Iterable[Any], rank: int, world: int, seed: int, *, drop_last: bool
    ) -> None:
        self.given: Any = given
        """The user's."""
        self._name = type(given).__name__
        made: Any = range(self._length())  # in place of a data set: its length is asked for
        super().__init__(made, world, rank, shuffle=True, seed=seed, drop_last=drop_last)
        self.dataset: Any = given
        self.size = len(made)
        """Of the order that was drawn last, of all ranks."""
        self.epoch: int = OwnEpoch(epoch_of(given))
        self.fingerprint = fingerprint_of(_comparable(self._order()))
        """Of the order of the pass that was begun last."""
        if self.fingerprint != fingerprint_of(_comparable(self._order())):
            text = f"{self._name}, which gives another order each time that it is asked for one"
            hint = (
                "draw from the global generators, which are seeded before each pass (leave out a "
                "`generator` of torch's samplers), or seed its generator in set_epoch(epoch)"
            )
            raise _refused(text, hint)

    @override
    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        self.fingerprint = fingerprint_of(_comparable(order))
        repeated = order * math.ceil(self.total_size / max(1, len(order)))
        return iter(repeated[self.rank : self.total_size : self.num_replicas])

    def _order(self) -> list[Any]:
        """Give the epoch's, of all ranks."""
        tell_epoch(self.given, self.epoch)
        with preserve_rng_state():
            seed_quickly(order_seed(self.seed, self.epoch))
            return self._drawn()

    def _length(self) -> int:
        """Give what the user's says of itself."""
        return _length_in(self.given)

    def _drawn(self) -> list[Any]:
        """
        Ask the user's for an order.

        Raises:
            SpecError: it has another length than the sampler says, or than before.
        """
        length = self._length()
        order = [_as_it_is(one) for one in itertools.islice(self.given, length + 1)]
        if len(order) != length:
            found = f"{len(order)} or more" if len(order) > length else len(order)
            text = f"{self._name}, which gives {found} samples and whose length is {length}"
            raise _refused(text, "have __len__ give as many")
        if length != self.size:
            text = f"{self._name}, which gives {length} samples now, and had {self.size} when"
            hint = "prepare a loader of each length, and call its set_epoch(epoch)"
            raise _refused(f"{text} it was prepared", hint)
        return order


class DealtBatches(DealtSampler):
    """
    Deals out the batches of a `batch_sampler`: rank r of N gets the batches r, r + N, r + 2N, ...

    A pass may have another number of them than the one before, and `__len__` need not say it.

    Args:
        given: the user's.
        samples: of the data set; None: it does not say.
        rank: see `DealtSampler`.
        world: see there.
        seed: see there.
        drop_last: see there.

    Raises:
        SpecError: it gives batches without end, or others each time that it is asked.
    """

    def __init__(
        self,
        given: Iterable[Any],
        samples: int | None,
        rank: int,
        world: int,
        seed: int,
        *,
        drop_last: bool,
    ) -> None:
        self._samples = samples
        super().__init__(given, rank, world, seed, drop_last=drop_last)

    @property
    def sampler(self) -> DealtBatches:
        """What a loop tells the epoch, as it tells that of torch's `BatchSampler`."""
        return self

    @override
    def __len__(self) -> int:
        if self._of_epoch != self.epoch:  # as of a schedule that is made before the pass
            self._order()
        return super().__len__()

    @override
    def _length(self) -> int:
        return length_of(self.given) or 0

    @override
    def _drawn(self) -> list[Any]:
        known = self._length() or self._samples
        most = _MANY * max(1, _length_in(self.given) if known is None else known)
        order = [
            _as_it_is(one) if hasattr(one, "__len__") else [*one]
            for one in itertools.islice(self.given, most + 1)
        ]
        if len(order) > most:
            text = f"{self._name}, which gives more than {most} batches in a pass"
            raise _refused(text, "have its __iter__ end, and its __len__ say how many it gives")
        self._of_epoch, self.size, world = int(self.epoch), len(order), self.num_replicas
        self.num_samples = self.size // world if self.drop_last else -(-self.size // world)
        self.total_size = self.num_samples * world
        return order


class RankSampler(DistributedSampler[Any]):
    """
    A sampler, or a `batch_sampler`, that deals out by rank itself; it is taken as it is.

    Args:
        given: the user's.
        dealer: says of which rank it gives the part; see `dealer_in`.

    Raises:
        SpecError: it has no length.
    """

    def __init__(self, given: Any, dealer: Any) -> None:
        self.given: Any = given
        """The user's."""
        made: Any = range(_length_in(given) * dealer.num_replicas)
        super().__init__(made, dealer.num_replicas, dealer.rank, shuffle=False)
        self.epoch = epoch_of(given)

    @property
    def sampler(self) -> RankSampler:
        """See `DealtBatches`."""
        return self

    @override
    def __iter__(self) -> Iterator[Any]:
        yield from self.given  # asked when the first one is: loaders ask for an iterator twice

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        tell_epoch(self.given, epoch)
        self.num_samples = _length_in(self.given)
        self.total_size = self.num_samples * self.num_replicas
        made: Any = range(self.total_size)
        self.dataset = made


def dealer_in(given: Any, rank: int, world: int) -> Any:
    """
    Give what deals a sampler's part out by rank, itself or its `sampler`; None: nothing does.

    One that knows of a single rank gives the order of all, and is dealt out as any other.

    Raises:
        SpecError: it gives the part of another rank, or of another number of ranks.
    """
    for one in (given, getattr(given, "sampler", None)):
        numbers = getattr(one, "rank", None), getattr(one, "num_replicas", None)
        if all(isinstance(number, int) for number in numbers):
            if numbers == (0, 1) and world > 1:
                return None
            if numbers != (rank, world):
                text = f"{type(one).__name__} of rank {numbers[0]}, num_replicas {numbers[1]}"
                hint = (
                    "make it with get_world_rank() and get_world_size() of distplat.get_context(), "
                    "or with rank 0 and num_replicas 1: prepare() deals the order out then"
                )
                raise _refused(f"{text}, on rank {rank} of {world} workers", hint)
            return one
    return None


class OwnEpoch(int):
    """An epoch that a loader tells a sampler: if a loop tells it the same number, that is seen."""


def check_ends(given: Any, samples: int | None, counted: str) -> None:
    """
    See that a sampler's order is that of a pass, as every rank draws the whole of it at once.

    A loop may have ``num_samples=int(1e10)`` to go on without epochs.

    Args:
        given: the user's.
        samples: of the data set; None: it does not say.
        counted: what the sampler gives, samples or batches.

    Raises:
        SpecError: it is that of many passes; says what to do.
    """
    length = length_of(given)
    if length is None or length <= max(_LONG, _MANY * (samples or 0)):
        return
    over = "" if samples is None else f" over {samples} samples"
    text = f"{type(given).__name__}, which gives {length} {counted} in a pass{over}"
    hint = (
        "give it the num_samples of one pass, and have the loop begin the next one when a pass is "
        "over; or leave the loader out of prepare(), if each rank draws samples of its own"
    )
    raise _refused(text, hint)


def shown_epoch(given: Any) -> tuple[type, int] | None:
    """Give what a sampler shows of the epoch that it was told last; another if it is told again."""
    epoch = getattr(_numbered(given), "epoch", None)
    return (type(epoch), epoch) if isinstance(epoch, int) else None


def epoch_of(given: Any) -> int:
    """Give the epoch that a sampler was told; 0: it has none."""
    shown = shown_epoch(given)
    return int(shown[1]) if shown is not None else 0


def tell_epoch(given: Any, epoch: int) -> None:
    """Tell a sampler the epoch of the next pass, if it takes one."""
    if (numbered := _numbered(given)) is not None:
        numbered.set_epoch(epoch)


def _numbered(given: Any) -> Any:
    """Give what is told the epoch, a sampler or its own `sampler`; None: neither is."""
    both = given, getattr(given, "sampler", None)
    return next((one for one in both if callable(getattr(one, "set_epoch", None))), None)


def check_order(sampler: DealtSampler, group: Collective, device: torch.device) -> None:
    """
    See that all ranks have the same order; every rank calls this.

    Raises:
        SpecError: names the ranks that have another one than rank 0.
    """
    if others := mismatched_ranks(sampler.fingerprint, group, device):
        names = ", ".join(map(str, others))
        text = f"sampler that gives another order on rank {names} than on rank 0"
        hint = (
            "have it give the order of all samples, the same on all ranks; one that deals out by "
            "rank itself is taken as it is if it has the attributes rank and num_replicas"
        )
        raise _refused(text, hint)


def _length_in(given: Any) -> int:
    if (length := length_of(given)) is None:
        raise _refused(f"{type(given).__name__}, which has no length", "give it a __len__")
    return length


def _as_it_is(one: Any) -> Any:
    """Copy what a sampler gives where it may change: it may fill the same list or array again."""
    if isinstance(one, int):
        return one
    return one.clone() if isinstance(one, Tensor) else copy.copy(one)


def _comparable(order: list[Any]) -> Any:
    """Give an order, of samples or of batches, in a form that is hashed quickly."""
    if order and all(isinstance(one, list | tuple) for one in order):
        lengths = np.fromiter(map(len, order), np.int64, len(order))
        return [lengths, _comparable([*itertools.chain(*order)])]
    numbers = all(isinstance(one, int | np.integer) for one in order)
    return np.asarray(order, np.int64) if numbers else order


def _refused(what: str, hint: str) -> SpecError:
    text = f"prepare() got a DataLoader with a {what}"
    return SpecError(Problem(("task",), text, hint))
