"""A small model under `hybrid`: compared with one process, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrid_models import BATCH, grid_of, hybrid_job, merge_parts
from local_run import train
from plain_loss import mean_loss
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.errors import SpecError
from distplat.strategies.task import Task

STEPS = 3
PLAN = {"0": "colwise", "2": "rowwise"}


class Small(Task):
    """A few linear layers; tests change the model by `wrap`."""

    wrap: Callable[[nn.Sequential], nn.Module] = staticmethod(lambda model: model)

    def model(self) -> nn.Module:
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        return type(self).wrap(nn.Sequential(*layers).double())

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        tensors = (torch.randn(2 * BATCH, size, generator=generator) for size in (6, 3))
        return TensorDataset(*(tensor.double() for tensor in tensors))

    def eval_data(self) -> TensorDataset:
        return self.train_data()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def task_of(wrap: Callable[[Any], Any], **methods: Any) -> type[Task]:
    return type("Made", (Small,), {"wrap": staticmethod(wrap), **methods})


def train_plain(task_type: type[Task], around: str = "") -> dict[str, Tensor]:
    task = task_type()
    torch.manual_seed(5)
    model, (inputs, targets) = task.model(), Small().train_data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        model.train()
        optimizer.zero_grad()
        batch = slice(step % 2 * BATCH, (step % 2 + 1) * BATCH)
        torch.autograd.backward(mean_loss(task, model(inputs[batch].clone()), targets[batch]))
        optimizer.step()
    return {around + name: value.detach() for name, value in model.state_dict().items()}


def train_grid(
    task_type: type[Task], grid: tuple[int, int, int], **options: Any
) -> dict[str, Tensor]:
    strategy, workers = grid_of(*grid, **options)
    job = hybrid_job(strategy, workers, steps=STEPS, data={"shuffle": False})
    return merge_parts(train(job, task_type))


def assert_matches_plain(
    task_type: type[Task], grid: tuple[int, int, int] = (2, 1, 1), **options: Any
) -> None:
    found, expected = train_grid(task_type, grid, **options), train_plain(task_type)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


def assert_refused(
    task_type: type[Task], *words: str, grid: tuple[int, int, int] = (2, 1, 1)
) -> None:
    more = {"tensor_plan": PLAN} if grid[1] > 1 else {}
    with pytest.raises(SpecError) as caught:
        train_grid(task_type, grid, **more)
    for word in (*words, "strategy" if grid[1] == 1 else ""):
        assert word in str(caught.value)
    assert caught.value.problems[0].hint
