"""A small model under `hybrid`, trained beside one process or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrid_models import BATCH, grid_of, hybrid_job, whole
from local_run import train
from plain_loss import mean_loss
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.errors import SpecError
from distplat.strategies.task import Task

STEPS = 3
PLAN = {"0": "colwise", "2": "rowwise"}


class Small(Task):
    """A few linear layers; each test makes something of them."""

    made: Callable[[nn.Sequential], nn.Module] = staticmethod(lambda model: model)

    def model(self) -> nn.Module:
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        return type(self).made(nn.Sequential(*layers).double())

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        made = (torch.randn(2 * BATCH, size, generator=generator) for size in (6, 3))
        return TensorDataset(*(tensor.double() for tensor in made))

    def eval_data(self) -> TensorDataset:
        return self.train_data()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def task_of(made: Callable[[Any], Any], **methods: Any) -> type[Task]:
    return type("Made", (Small,), {"made": staticmethod(made), **methods})


def plain(kind: type[Task], around: str = "") -> dict[str, Tensor]:
    task = kind()
    torch.manual_seed(5)
    model, (inputs, targets) = task.model(), Small().train_data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        model.train()
        optimizer.zero_grad()
        here = slice(step % 2 * BATCH, (step % 2 + 1) * BATCH)
        torch.autograd.backward(mean_loss(task, model(inputs[here].clone()), targets[here]))
        optimizer.step()
    return {around + name: value.detach() for name, value in model.state_dict().items()}


def trained(kind: type[Task], grid: tuple[int, int, int], **options: Any) -> dict[str, Tensor]:
    chosen, workers = grid_of(*grid, **options)
    job = hybrid_job(chosen, workers, steps=STEPS, data={"shuffle": False})
    return whole(train(job, kind))


def same(kind: type[Task], grid: tuple[int, int, int] = (2, 1, 1), **options: Any) -> None:
    found, expected = trained(kind, grid, **options), plain(kind)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


def refused(kind: type[Task], *words: str, grid: tuple[int, int, int] = (2, 1, 1)) -> None:
    more = {"tensor_plan": PLAN} if grid[1] > 1 else {}
    with pytest.raises(SpecError) as caught:
        trained(kind, grid, **more)
    for word in (*words, "strategy" if grid[1] == 1 else ""):
        assert word in str(caught.value)
    assert caught.value.problems[0].hint
