"""Ranks that have another model, other data or other code than the rest are told so by name."""

import dataclasses
import random
import re
import sys
import threading
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat.platform.errors import SpecError
from distplat.platform.spec import Job
from distplat.strategies.fakes import InMemoryRunStore
from distplat.strategies.loop.agreement import agree, facts_of, hash_samples
from distplat.strategies.loop.sample_hash import hash_of
from distplat.strategies.loop.seeding import rng_states
from distplat.strategies.task import Task

STRATEGIES: list[Any] = [
    "ring",
    "ps-sync",
    "ps-async",
    {"name": "hybrid", "pipeline": 2, "micro_batches": 2, "cut": "even"},
]


class Small(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(20, 4, generator=generator), torch.zeros(20, 2))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


def job(strategy: Any) -> Job:
    return job_of(strategy, 2, steps=2, global_batch_size=8)


def refusal(strategy: Any, kind: type[Task]) -> str:
    """Give what the user is told; no rank waits for another longer than its error takes."""
    with pytest.raises(SpecError) as caught:
        train(job(strategy), kind)
    assert caught.value.exit_code == 2
    return str(caught.value)


class Once:
    """True for the first who asks."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        first, self._asked = not self._asked, True
        return first


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_number_of_samples(strategy: Any) -> None:
    first = Once()

    class Growing(Small):
        def train_data(self) -> TensorDataset:
            size = 20 if first() else 16
            return TensorDataset(*(tensor[:size] for tensor in super().train_data().tensors))

    told = refusal(strategy, Growing)
    pattern = r"worker-(0 has 20 training samples, worker-1 has 16|1 has 16 .*, worker-0 has 20)"
    assert re.search(pattern, told), told


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_samples(strategy: Any) -> None:
    first = Once()

    class Shuffled(Small):
        def train_data(self) -> TensorDataset:
            found = super().train_data()
            return found if first() else TensorDataset(*(t.flip(0) for t in found.tensors))

    told = refusal(strategy, Shuffled)
    assert re.search(r"worker-\d has other training samples than worker-\d: 16 of 16", told), told


def test_another_number_of_evaluation_samples() -> None:
    first = Once()

    class Growing(Small):
        def eval_data(self) -> Dataset[Any] | None:
            return super().train_data() if first() else None

    assert re.search(r"has (20|no) evaluation samples", refusal("ring", Growing))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_model(strategy: Any) -> None:
    first = Once()

    class Wider(Small):
        def model(self) -> nn.Module:
            model = super().model()
            assert isinstance(model, nn.Sequential)
            if not first():
                model[2] = nn.Linear(3, 2, bias=False)
                model[0].bias.requires_grad_(False)
                model[1].running_mean = torch.zeros(3, dtype=torch.float64)
            return model

    told = refusal(strategy, Wider)
    for name in ("0.bias", "2.bias", "1.running_mean"):
        assert repr(name) in told, told
    assert "not there on worker-" in told
    assert "a frozen parameter, float32 [3]" in told
    assert "a buffer, float64 [3]" in told


def test_other_values_of_a_model_are_no_difference() -> None:
    class Random(Small):
        def model(self) -> nn.Module:
            torch.manual_seed(random.SystemRandom().randrange(1 << 30))
            return super().model()

    run = train(job("ring"), Random)
    one, other = run.parameters(0), run.parameters(1)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "task.py"
    module = ModuleType("their_task")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "their_task", module)

    class Edited(Small):
        __module__ = "their_task"

    task, run_store = Edited(), InMemoryRunStore()
    facts = []
    for text in ("version = 1", "version = 2"):
        path.write_text(text)
        facts.append(facts_of(task, task.model(), task.train_data(), None, 0))
    agree(facts[0], 1, run_store, lambda positions: {})
    agree(facts[0], 0, run_store, lambda positions: {})
    with pytest.raises(SpecError, match=r"worker-2 runs another task\.py than worker-1"):
        agree(facts[1], 2, run_store, lambda positions: {})


class Noisy(Dataset[Any]):
    """Its samples are others each time: from a generator that it holds."""

    def __init__(self) -> None:
        self._draw = np.random.default_rng()

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._draw.standard_normal(4)).float(), torch.zeros(2)


def test_samples_that_are_others_each_time_say_nothing() -> None:
    class Augmented(Small):
        def train_data(self) -> Any:
            return Noisy()

    train(job("ring"), Augmented)


class Drawing(Dataset[Any]):
    """Each of its samples draws from one of the global generators, or from none."""

    drawn: ClassVar[list[Any]] = []

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        draws = (lambda: torch.rand(1).item(), np.random.rand, random.random)
        if index == 7:
            raise OSError
        if index > 2:
            return index + self._offset
        self.drawn.append(draws[index]())
        return self.drawn[-1]


def test_samples_that_draw_are_not_compared_and_leave_the_generators_alone() -> None:
    Drawing.drawn.clear()
    torch.manual_seed(5)
    before = rng_states()
    one = hash_samples(Drawing(), [0, 1, 2, 3, 7, 8])
    assert rng_states() == before
    other = hash_samples(Drawing(), [8, 7, 3, 2, 1, 0])
    assert one == other
    assert one[7] == "raises OSError" and one[3] != one[8]
    assert {one[0], one[1], one[2]} == {"draws random numbers"}
    assert len({*Drawing.drawn}) == 6, "no rank draws what another has drawn"


def test_samples_that_draw_nothing_are_compared_beside_those_that_do() -> None:
    task, run_store = Small(), InMemoryRunStore()
    again = partial(hash_samples, Drawing(1))
    facts = [facts_of(task, task.model(), Drawing(offset), None, 0) for offset in (0, 0, 1)]
    agree(facts[0], 0, run_store, again)
    agree(facts[1], 1, run_store, again)
    with pytest.raises(SpecError, match="5 of 9 that were compared differ, of the numbers 3, 4, 5"):
        agree(facts[2], 2, run_store, again)


Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Sample:
    x: Tensor
    y: int


def test_a_hash_sees_values_types_and_shapes_at_any_depth() -> None:
    x = torch.arange(4.0)
    values: list[Any] = [
        x,
        x.double(),
        x.view(2, 2),
        x.numpy(),
        x.flip(0),
        [x, 1],
        (x, 1),
        {"x": x, "y": 1},
        {"x": x, "y": 2},
        Pair(x, 1),
        Sample(x, 1),
        Sample(x, 2),
        "x",
        b"x",
        None,
        1,
        1.0,
        True,
        np.float32(1),
        np.array(["a", None], dtype=object),
    ]
    assert len({hash_of(value) for value in values}) == len(values)
    assert hash_of([*values]) == hash_of([*values])
    assert hash_of(threading.Lock()) == hash_of(threading.Lock())
