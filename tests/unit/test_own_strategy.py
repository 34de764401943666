"""The example strategy in one file implements local SGD."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat.platform.spec import Job
from distplat.strategies.catalog import load_strategy_file, strategies
from distplat.strategies.task import Task

FILE = Path(__file__).parents[2] / "examples" / "own_strategy.py"


class Line(Task):
    """A small regression."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(3)
        return TensorDataset(
            torch.randn(24, 4, generator=generator), torch.randn(24, 1, generator=generator)
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    load_strategy_file(FILE)
    yield
    strategies._items.pop("local-sgd")


def job(strategy: Any, momentum: float = 0.0, steps: int = 12) -> Job:
    optimizer = {"name": "SGD", "lr": 0.1, "momentum": momentum}
    return job_of(
        strategy, 3, task="tests:Line", optimizer=optimizer, global_batch_size=12, steps=steps
    )


def vector(strategy: object, **overrides: Any) -> Tensor:
    parameters = train(job(strategy, **overrides), Line).parameters()
    return torch.cat([p.flatten() for p in parameters.values()])


def test_period_one_without_momentum_is_ring() -> None:
    local, ring = vector({"name": "local-sgd", "period": 1}), vector("ring")
    assert torch.linalg.vector_norm(local - ring) < 1e-5 * torch.linalg.vector_norm(ring)


def test_longer_period_is_another_algorithm() -> None:
    local, ring = vector({"name": "local-sgd", "period": 4}), vector("ring")
    assert torch.linalg.vector_norm(local - ring) > 1e-4 * torch.linalg.vector_norm(ring)


def test_ranks_agree_at_the_end_of_a_partial_period() -> None:
    run = train(job({"name": "local-sgd", "period": 50}), Line)
    first, second = run.parameters(0), run.parameters(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
