"""Generators held by a data set are found at any depth and named in a warning."""

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

MODULE_RNG = np.random.default_rng(3)


class Plain(Dataset[Any]):
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(4), torch.zeros(1)


class ClassAttribute(Plain):
    rng = random.Random(1)


class ModuleGlobal(Plain):
    def __getitem__(self, index: int) -> Any:
        return MODULE_RNG.random(), torch.zeros(1)


class Slotted:
    __slots__ = ("rng",)

    def __init__(self) -> None:
        self.rng = random.Random(1)


def closure_over_rng() -> Any:
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
        (Plain(transform=closure_over_rng()), ["self.transform.<rng>"]),
        (
            Plain(transform=functools.partial(jitter, rng=random.Random(1))),
            ["self.transform.keywords['rng']"],
        ),
        (Plain(part=Slotted()), ["self.part.rng"]),
        (ClassAttribute(), ["self.rng"]),
        (ModuleGlobal(), [f"self.<{__name__}.MODULE_RNG>"]),
        (Plain(), []),
        (Plain(numpy=np.random, python=random, of_numpy=np.random.mtrand._rand), []),
        (TensorDataset(torch.zeros(4, 2)), []),
        ([(torch.zeros(2), 1)] * 5000, []),
    ],
)
def test_held_generators_are_named(data: Any, names: list[str]) -> None:
    assert held_generators(data) == names


def test_cyclic_and_repeated_objects_are_visited_once() -> None:
    data = Plain()
    data.__dict__["itself"] = data
    data.__dict__["objects"] = [[[[object() for _ in range(60)] for _ in range(60)]] * 60] * 60
    assert held_generators(data) == []


class HoldsGenerator(Dropping):
    def train_data(self) -> Any:
        return Plain(rng=random.Random(1))


def test_prepare_warns_about_a_held_generator(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepare(job(), HoldsGenerator())
        (record,) = caplog.records
        assert "train_data(): Plain holds" in record.message
        assert "self.rng" in record.message
        assert "distplat.sample_rng()" in record.message
        caplog.clear()
        prepare(job(), Dropping())
    assert not caplog.records


class InMemory(Dataset[Any]):
    """Applies a function to each of its in-memory samples."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._data, self._change = torch.arange(12.0).view(4, 3), change

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self._change(self._data[index]), index


def double_in_place_and_clone(x: torch.Tensor) -> torch.Tensor:
    x *= 2
    return x.clone()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.sub_(1), "differs when it is read again"),
        (double_in_place_and_clone, "or draws from a generator without a seed"),
        (lambda x: x * secrets.randbits(40), "or draws from a generator without a seed"),
        (lambda x: x - x.mean(), ""),
        (lambda x: x.clamp_(0, 5), ""),
        (lambda x: x + torch.randn(3) + random.random() + np.random.rand(), ""),
        (lambda x: x[5], ""),
    ],
)
def test_warns_if_reading_changes_a_sample(
    change: Callable[[torch.Tensor], torch.Tensor], expected: str
) -> None:
    data, before = InMemory(change), rng_states()
    warning = reading_warning(data, [3, 1])
    assert expected in warning and bool(warning) == bool(expected)
    assert "sample 3" in warning or not expected
    assert rng_states() == before, "the generators are restored"


def test_describe_warns_if_reading_changes_a_sample() -> None:
    class InPlaceTask(Dropping):
        def train_data(self) -> Dataset[Any]:
            return InMemory(lambda x: x.add_(1))

    prepared = prepare(job(), InPlaceTask())
    assert prepared.warnings == []
    describe(prepared)
    [warning] = prepared.warnings
    assert "differs when it is read again" in warning


def test_data_with_a_held_generator_is_not_read_again() -> None:
    class Counting(Plain):
        reads = 0

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            return torch.zeros(3), index

    data = Counting(rng=random.Random(1))
    assert reading_warning(data, [0]) == ""
    assert data.reads == 0
    assert reading_warning(Counting(), []) == ""
