"""The order of a loader's own sampler, of which each rank takes its part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.algorithms.seeds import order_seed
from distplat.strategies.collective import Collective, ranks_apart
from distplat.strategies.loop.sample_hash import fingerprint_of
from distplat.strategies.loop.seeding import preserve_rng_state, seed_quickly


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
        self._given, self._name = given, type(given).__name__
        if not hasattr(given, "__len__"):
            raise _refused(f"{self._name}, which has no length", "give it a __len__")
        made: Any = given  # in place of a data set: its length is asked for
        super().__init__(made, world, rank, shuffle=True, seed=seed, drop_last=drop_last)
        self._size = len(made)
        self.epoch = self.told_epoch()
        self.fingerprint = fingerprint_of(_comparable(self._order()))
        """Of the order of the pass that was begun last."""
        if self.fingerprint != fingerprint_of(_comparable(self._order())):
            text = f"{self._name}, which gives another order each time that it is asked for one"
            hint = (
                "draw from the global generators, which are seeded before each pass, or seed its "
                "generator in set_epoch(epoch)"
            )
            raise _refused(text, hint)

    @override
    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        self.fingerprint = fingerprint_of(_comparable(order))
        repeated = order * math.ceil(self.total_size / max(1, len(order)))
        return iter(repeated[self.rank : self.total_size : self.num_replicas])

    def told_epoch(self) -> int:
        """Give the epoch that was told last: this one, or the user's, where one can see it."""
        known = getattr(self._given, "epoch", None)
        return known if self._numbered and isinstance(known, int) else int(self.epoch)

    @property
    def _numbered(self) -> bool:
        return callable(getattr(self._given, "set_epoch", None))

    def _order(self) -> list[Any]:
        """Give the epoch's, of all ranks."""
        given: Any = self._given
        if self._numbered:
            given.set_epoch(self.epoch)
        with preserve_rng_state():
            seed_quickly(order_seed(self.seed, self.epoch))
            order = list(given)
        if len(order) != len(given):
            text = f"{self._name}, which gives {len(order)} samples and whose length is"
            raise _refused(f"{text} {len(given)}", "have __len__ give as many")
        if len(order) != self._size:
            text = f"{self._name}, which gives {len(order)} samples now, and had {self._size} when"
            hint = "prepare a loader of each length, and call its set_epoch(epoch)"
            raise _refused(f"{text} it was prepared", hint)
        return order


def check_order(sampler: DealtSampler, group: Collective, device: torch.device) -> None:
    """
    See that all ranks have the same order; every rank calls this.

    Raises:
        SpecError: names the ranks that have another one than rank 0.
    """
    if others := ranks_apart(sampler.fingerprint, group, device):
        names = ", ".join(map(str, others))
        text = f"sampler that gives another order on rank {names} than on rank 0"
        raise _refused(text, "have it give the order of all samples, the same on all ranks")


def _comparable(order: list[Any]) -> Any:
    """Give an order in a form that is hashed quickly."""
    numbers = all(isinstance(one, int | np.integer) for one in order)
    return np.asarray(order, np.int64) if numbers else order


def _refused(what: str, hint: str) -> SpecError:
    text = f"prepare() got a DataLoader with a {what}"
    return SpecError(Problem(("task",), text, hint))
