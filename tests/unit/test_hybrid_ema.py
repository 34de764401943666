"""The EMA of a cut model, assembled, matches that of one process.

The jobs of `test_hybrid_faults.py` and `test_hybrid_server_faults.py` cover the EMA after a lost
worker.
"""

from functools import cache
from typing import Any

import pytest
import torch
from comparison import distance
from hybrid_models import (
    GPT_PLAN,
    INCEPTION_PLAN,
    Gpt,
    NormedInception,
    grid_of,
    hybrid_job,
    merge_parts,
)
from local_run import LocalRun, evaluations, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from distplat.platform.spec import Job
from distplat.platform.tensor_file import EMA_PREFIX
from distplat.strategies.task import Task

STEPS, HALF, BATCH = 6, 3, 16


class Shifting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:
        return hidden + torch.tanh(self.inner(hidden)) * shift


class TiedModel(nn.Module):
    """An embedding, blocks, and a tied head: two stages share the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.blocks = nn.ModuleList(Shifting() for _ in range(4))
        self.head.weight = self.table.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.table(inputs)
        shift = inputs.unsqueeze(-1) / 11
        for block in self.blocks:
            hidden = block(hidden, shift)
        outputs: Tensor = self.head(hidden[:, -1])
        return outputs


class Tied(Gpt):
    def model(self) -> nn.Module:
        return TiedModel()


PS_SYNC = {"data_strategy": "ps-sync", "num_servers": 2}
GRIDS: dict[str, tuple[type[Task], dict[str, Any], int]] = {
    "stages and replicas": (Gpt, *grid_of(2, 1, 2)),
    "several chunks": (Gpt, *grid_of(2, 1, 1, schedule="interleaved")),
    "slices": (Gpt, *grid_of(1, 2, 2, tensor_plan=GPT_PLAN)),
    "branches": (NormedInception, *grid_of(2, 2, 1, tensor_plan=INCEPTION_PLAN, micro_batches=1)),
    "servers": (Gpt, *grid_of(2, 1, 2, **PS_SYNC)),
    "servers of slices": (Gpt, *grid_of(2, 2, 1, tensor_plan=GPT_PLAN, **PS_SYNC)),
    "copies": (Gpt, *grid_of(1, 1, 2)),
    "tied": (Tied, *grid_of(2, 1, 1)),
    "one process": (Gpt, {"name": "ring"}, 1),
}


def job(grid: str, **overrides: Any) -> Job:
    _, options, workers = GRIDS[grid]
    fields: dict[str, Any] = {
        "steps": STEPS,
        "ema": {"decay": 0.8, "warmup": True},
        "evaluation": {"every_steps": HALF},
        "checkpoint": {"every_steps": HALF},
        "clip_norm": 0.5,
        **overrides,
    }
    return hybrid_job(options, workers, **fields)


@cache
def train_in_one_process(task_type: type[Task]) -> LocalRun:
    """Train in one process under `ring`: `test_ema.py` compares its EMA with torch's."""
    return train(job("one process"), task_type)


@cache
def uninterrupted(grid: str) -> LocalRun:
    return train(job(grid), GRIDS[grid][0])


def metric_values(run: LocalRun, name: str) -> list[float]:
    return [evaluation.metrics[name] for evaluation in evaluations(run)]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "one process"])
def test_ema_matches_one_process(grid: str) -> None:
    run, expected = uninterrupted(grid), train_in_one_process(GRIDS[grid][0])
    found = merge_parts(run)
    assert any(name.startswith(EMA_PREFIX) for name in found)
    assert distance(found, merge_parts(expected)) < 1e-5
    for name in ("loss", "ema_loss", "ema_accuracy"):
        assert metric_values(run, name) == pytest.approx(metric_values(expected, name), rel=1e-4)
    assert metric_values(run, "loss") != pytest.approx(metric_values(run, "ema_loss"), rel=1e-3)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("origin", "to"),
    [
        ("stages and replicas", "stages and replicas"),
        ("servers of slices", "servers of slices"),
        ("slices", "servers"),
        ("servers", "one process"),
        ("one process", "slices"),
    ],
)
def test_any_grid_resumes_the_ema_from_a_checkpoint(origin: str, to: str) -> None:
    expected = merge_parts(uninterrupted(origin))
    found = merge_parts(train(job(to), Gpt, saved=uninterrupted(origin).checkpoints[HALF]))
    assert distance(found, expected) < 1e-5
    if to == origin:
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class First(nn.Module):
    """Also returns which samples need the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(inputs[:, 1:]), inputs[:, 0]


class Conditional(nn.Module):
    """Skips its layer if no sample of the batch needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
        hidden, needed = value
        return hidden + self.inner(hidden) if needed.any() else hidden


class SkippedStage(Task):
    """Every second batch skips the middle stage."""

    def model(self) -> nn.Module:
        return nn.Sequential(First(), Conditional(), nn.Linear(4, 2)).double()

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(4 * BATCH, 5, generator=generator).double()
        inputs[:, 0] = torch.tensor([1, 0, 1, 0]).repeat_interleave(BATCH)
        return TensorDataset(inputs, torch.randn(4 * BATCH, 2, generator=generator).double())

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


@pytest.mark.parametrize(
    "strategy",
    [grid_of(3, 1, 1), grid_of(3, 1, 1, data_strategy="ps-sync"), ({"name": "ring"}, 1)],
    ids=["ring", "servers", "one process"],
)
def test_ema_of_a_stage_is_updated_in_steps_that_skip_it(
    strategy: tuple[dict[str, Any], int],
) -> None:
    """The reference is torch's loop: the average approaches unchanged weights, too."""
    fields: dict[str, Any] = {"steps": 4, "data": {"shuffle": False}, "ema": {"decay": 0.8}}
    found = merge_parts(train(hybrid_job(*strategy, **fields), SkippedStage))
    torch.manual_seed(5)
    task = SkippedStage()
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    multi_avg_fn: Any = get_ema_multi_avg_fn
    average = AveragedModel(model, multi_avg_fn=multi_avg_fn(0.8))
    data = task.train_data()
    for step in range(4):
        inputs, targets = data[BATCH * step : BATCH * (step + 1)]
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
        average.update_parameters(model)
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(found[EMA_PREFIX + name], value, rtol=0, atol=1e-10)
