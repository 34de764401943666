"""Ranks compare their model, data and code, and the error names the rank that differs."""

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


def spec_error_of(strategy: Any, task: type[Task]) -> str:
    """Train, and return the message of the `SpecError`; no rank waits for its deadline."""
    with pytest.raises(SpecError) as caught:
        train(job(strategy), task)
    assert caught.value.exit_code == 2
    return str(caught.value)


class IsFirstCall:
    """Return True at the first call, then False."""

    def __init__(self) -> None:
        self._called = False

    def __call__(self) -> bool:
        first, self._called = not self._called, True
        return first


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rejects_different_number_of_training_samples(strategy: Any) -> None:
    is_first = IsFirstCall()

    class Growing(Small):
        def train_data(self) -> TensorDataset:
            size = 20 if is_first() else 16
            return TensorDataset(*(tensor[:size] for tensor in super().train_data().tensors))

    message = spec_error_of(strategy, Growing)
    pattern = r"worker-(0 has 20 training samples, worker-1 has 16|1 has 16 .*, worker-0 has 20)"
    assert re.search(pattern, message), message


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rejects_different_training_samples(strategy: Any) -> None:
    is_first = IsFirstCall()

    class Shuffled(Small):
        def train_data(self) -> TensorDataset:
            data = super().train_data()
            return data if is_first() else TensorDataset(*(t.flip(0) for t in data.tensors))

    message = spec_error_of(strategy, Shuffled)
    assert re.search(r"worker-\d has other training samples than worker-\d: 16 of 16", message), (
        message
    )


def test_rejects_different_number_of_evaluation_samples() -> None:
    is_first = IsFirstCall()

    class Growing(Small):
        def eval_data(self) -> Dataset[Any] | None:
            return super().train_data() if is_first() else None

    assert re.search(r"has (20|no) evaluation samples", spec_error_of("ring", Growing))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rejects_different_models(strategy: Any) -> None:
    is_first = IsFirstCall()

    class Wider(Small):
        def model(self) -> nn.Module:
            model = super().model()
            assert isinstance(model, nn.Sequential)
            if not is_first():
                model[2] = nn.Linear(3, 2, bias=False)
                model[0].bias.requires_grad_(False)
                model[1].running_mean = torch.zeros(3, dtype=torch.float64)
            return model

    message = spec_error_of(strategy, Wider)
    for name in ("0.bias", "2.bias", "1.running_mean"):
        assert repr(name) in message, message
    assert "not there on worker-" in message
    assert "a frozen parameter, float32 [3]" in message
    assert "a buffer, float64 [3]" in message


def test_accepts_different_initial_values() -> None:
    class Random(Small):
        def model(self) -> nn.Module:
            torch.manual_seed(random.SystemRandom().randrange(1 << 30))
            return super().model()

    run = train(job("ring"), Random)
    first, second = run.parameters(0), run.parameters(1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rejects_different_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Returns different samples at each access: it owns an unseeded generator."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng()

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._rng.standard_normal(4)).float(), torch.zeros(2)


def test_accepts_nondeterministic_samples() -> None:
    class Augmented(Small):
        def train_data(self) -> Any:
            return Noisy()

    train(job("ring"), Augmented)


class PartlyRandom(Dataset[Any]):
    """Samples 0 to 2 each draw from one of the global generators; the others draw nothing."""

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


def test_excludes_random_samples_and_restores_generators() -> None:
    PartlyRandom.drawn.clear()
    torch.manual_seed(5)
    before = rng_states()
    hashes = hash_samples(PartlyRandom(), [0, 1, 2, 3, 7, 8])
    assert rng_states() == before
    assert hash_samples(PartlyRandom(), [8, 7, 3, 2, 1, 0]) == hashes
    assert hashes[7] == "raises OSError" and hashes[3] != hashes[8]
    assert {hashes[0], hashes[1], hashes[2]} == {"draws random numbers"}
    assert len({*PartlyRandom.drawn}) == 6, "each rank draws different numbers"


def test_compares_deterministic_samples_of_a_mixed_dataset() -> None:
    task, run_store = Small(), InMemoryRunStore()
    rehash = partial(hash_samples, PartlyRandom(1))
    facts = [facts_of(task, task.model(), PartlyRandom(offset), None, 0) for offset in (0, 0, 1)]
    agree(facts[0], 0, run_store, rehash)
    agree(facts[1], 1, run_store, rehash)
    with pytest.raises(SpecError, match="5 of 9 that were compared differ, of the numbers 3, 4, 5"):
        agree(facts[2], 2, run_store, rehash)


Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Sample:
    x: Tensor
    y: int


def test_hash_includes_values_types_and_shapes_at_any_depth() -> None:
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
