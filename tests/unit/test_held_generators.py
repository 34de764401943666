"""Generators that a data set holds itself are found, however deep, and told by name."""

import functools
import logging
import random
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_draws import Dropping, job
from torch.utils.data import Dataset, Subset, TensorDataset

from distplat.strategies.loop.loaders import held_generators
from distplat.strategies.loop.seeding import rng_states
from distplat.strategies.loop.session import describe, prepare
from distplat.strategies.loop.task_warnings import reading_warning

MODULES_OWN = np.random.default_rng(3)


class Plain(Dataset[Any]):
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(4), torch.zeros(1)


class OfItsClass(Plain):
    rng = random.Random(1)


class OfItsModule(Plain):
    def __getitem__(self, index: int) -> Any:
        return MODULES_OWN.random(), torch.zeros(1)


class Slotted:
    __slots__ = ("rng",)

    def __init__(self) -> None:
        self.rng = random.Random(1)


def closed_over() -> Any:
    rng = np.random.RandomState(1)
    return lambda value: value + rng.rand()


def jitter(value: Any, rng: Any) -> Any:
    return value + rng.random()


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (Plain(rng=random.Random(1)), ["self.rng"]),
        (Plain(a=torch.Generator(), b=np.random.default_rng(1)), ["self.a", "self.b"]),
        (Plain(old=np.random.RandomState(1)), ["self.old"]),
        (
            Subset(Plain(transform=Plain(transforms=[len, Plain(rng=random.Random(1))])), [0]),
            ["self.dataset.transform.transforms[1].rng"],
        ),
        (Plain(options={"rng": random.Random(1)}), ["self.options['rng']"]),
        (Plain(transform=closed_over()), ["self.transform.<rng>"]),
        (
            Plain(transform=functools.partial(jitter, rng=random.Random(1))),
            ["self.transform.keywords['rng']"],
        ),
        (Plain(part=Slotted()), ["self.part.rng"]),
        (OfItsClass(), ["self.rng"]),
        (OfItsModule(), [f"self.<{__name__}.MODULES_OWN>"]),
        (Plain(), []),
        (Plain(numpy=np.random, python=random, of_numpy=np.random.mtrand._rand), []),
        (TensorDataset(torch.zeros(4, 2)), []),
        ([(torch.zeros(2), 1)] * 5000, []),
    ],
)
def test_held_generators_are_named(data: Any, names: list[str]) -> None:
    assert held_generators(data) == names


def test_what_holds_itself_is_gone_through_once() -> None:
    data = Plain()
    data.__dict__["me"] = data
    data.__dict__["lots"] = [[[[object() for _ in range(60)] for _ in range(60)]] * 60] * 60
    assert held_generators(data) == []


class Holding(Dropping):
    def train_data(self) -> Any:
        return Plain(rng=random.Random(1))


def test_a_run_warns_and_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepare(job(), Holding())
        (record,) = caplog.records
        assert "train_data(): Plain holds" in record.message
        assert "self.rng" in record.message
        assert "distplat.sample_rng()" in record.message
        caplog.clear()
        prepare(job(), Dropping())
    assert not caplog.records


class Stored(Dataset[Any]):
    """Has its samples in memory, and gives each to a function."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._data, self._change = torch.arange(12.0).view(4, 3), change

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self._change(self._data[index]), index


def doubled_in_place_and_copied(x: torch.Tensor) -> torch.Tensor:
    x *= 2
    return x.clone()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x.sub_(1), "differs when it is read again"),
        (doubled_in_place_and_copied, "or draws from a generator without a seed"),
        (lambda x: x * secrets.randbits(40), "or draws from a generator without a seed"),
        (lambda x: x - x.mean(), ""),
        (lambda x: x.clamp_(0, 5), ""),
        (lambda x: x + torch.randn(3) + random.random() + np.random.rand(), ""),
        (lambda x: x[5], ""),
    ],
)
def test_a_sample_that_reading_changes_is_told(
    change: Callable[[torch.Tensor], torch.Tensor], told: str
) -> None:
    data, before = Stored(change), rng_states()
    found = reading_warning(data, [3, 1])
    assert told in found and bool(found) == bool(told)
    assert "sample 3" in found or not told
    assert rng_states() == before, "training goes on with the same numbers"


def test_rank_0_says_so_before_the_first_step() -> None:
    class Kind(Dropping):
        def train_data(self) -> Dataset[Any]:
            return Stored(lambda x: x.add_(1))

    prepared = prepare(job(), Kind())
    assert prepared.warnings == []
    describe(prepared)
    [warning] = prepared.warnings
    assert "differs when it is read again" in warning


def test_data_with_a_generator_of_its_own_is_read_no_second_time() -> None:
    class Counting(Plain):
        read = 0

        def __getitem__(self, index: int) -> Any:
            self.read += 1
            return torch.zeros(3), index

    data = Counting(rng=random.Random(1))
    assert reading_warning(data, [0]) == ""
    assert data.read == 0
    assert reading_warning(Counting(), []) == ""
