"""Arguments, shapes and seeds of each task method, as documented in docs/task.md."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.strategies.algorithms.seeds import (
    collate_seed,
    derive_seed,
    epoch_seed,
    evaluation_data_seed,
    evaluation_seed,
    order_seed,
    step_seed,
)

PAGE = (Path(__file__).parents[2] / "docs" / "task.md").read_text()
SEED, SAMPLES, BATCH, STEPS = 5, 8, 4, 2

Calls = list[tuple[str, int, Any]]
"""Method, torch's seed and the shapes of the arguments, by call."""


def shape_of(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [shape_of(item) for item in value]
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


class RecordingTask(Task):
    """Records its calls. Use one rank only: ranks are threads and share torch's generator."""

    calls: ClassVar[Calls] = []

    def record(self, method: str, *args: Any) -> None:
        self.calls.append((method, torch.initial_seed(), [shape_of(arg) for arg in args]))

    def __init__(self) -> None:
        self.record("__init__")

    def model(self) -> nn.Module:
        self.record("model")
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def train_data(self) -> Dataset[Any]:
        self.record("train_data")
        return TensorDataset(torch.ones(SAMPLES, 3), torch.ones(SAMPLES, 2))

    def eval_data(self) -> Dataset[Any]:
        self.record("eval_data")
        return TensorDataset(torch.ones(3, 3), torch.ones(3, 2))

    def collate(self, samples: list[Any]) -> Any:
        self.record("collate", samples)
        return super().collate(samples)

    def loss(self, outputs: Any, targets: Any) -> Any:
        self.record("loss", outputs, targets)
        return nn.functional.mse_loss(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        self.record("metrics", outputs, targets)
        return {"constant": 1.0}


class FullTask(RecordingTask):
    """Adds the methods that some strategies do not support."""

    def sampler(self, data: Any, epoch: int) -> Any:
        self.record("sampler", data, epoch)
        return torch.arange(SAMPLES)

    def lr(self, step: int, total: int) -> float:
        self.record("lr", step, total)
        return 1.0

    def forward(self, model: nn.Module, batch: Any) -> Any:
        self.record("forward", model, batch)
        return model(batch[0])

    def loss(self, outputs: Any, targets: Any) -> Any:
        self.record("loss", outputs, targets)
        return {"all": nn.functional.mse_loss(outputs, targets[1], reduction="sum")}

    def weights(self, batch: Any) -> dict[str, float]:
        self.record("weights", batch)
        return {"all": float(len(batch[0]))}


class OptimizerTask(FullTask):
    def optimizer(self, named_parameters: Any) -> torch.optim.Optimizer:
        self.record("optimizer", *named_parameters[0])
        return torch.optim.SGD([parameter for _, parameter in named_parameters], lr=0.1)


def run(cls: type[RecordingTask], strategy: Any, accumulation: int = 2, **more: Any) -> Calls:
    RecordingTask.calls = []
    fields = {"steps": STEPS, "global_batch_size": BATCH, "seed": SEED, **more}
    train(job_of(strategy, 1, gradient_accumulation=accumulation, **fields), cls)
    return RecordingTask.calls


def split_evaluations(calls: Calls, evaluations: int = 1) -> tuple[Calls, Calls]:
    """Split at the first collate of the last evaluations into training and evaluation."""
    collates = [index for index, call in enumerate(calls) if call[0] == "collate"]
    return calls[: collates[-evaluations]], calls[collates[-evaluations] :]


def calls_of(calls: Calls, method: str) -> list[tuple[int, Any]]:
    return [(seed, shapes) for name, seed, shapes in calls if name == method]


ONCE = ["__init__", "model", "train_data", "eval_data", "lr", "optimizer"]


@pytest.mark.parametrize(
    ("strategy", "cls", "optimizer"),
    [
        ("ring", OptimizerTask, {"name": "task"}),
        ("ps-sync", FullTask, {"name": "SGD", "lr": 0.1}),
        ("ps-async", FullTask, {"name": "SGD", "lr": 0.1}),
    ],
)
def test_seeds_and_shapes_of_a_whole_model(
    strategy: str, cls: type[RecordingTask], optimizer: dict[str, Any]
) -> None:
    training, evaluation = split_evaluations(run(cls, strategy, optimizer=optimizer))
    for method in ONCE:
        method_calls = calls_of(training, method)
        assert bool(method_calls) == (method != "optimizer" or strategy == "ring")
        assert {seed for seed, _ in method_calls} <= {SEED}, method
    assert {seed for seed, _ in calls_of(training, "sampler")} == {order_seed(SEED, 0)}
    steps = [step_seed(SEED, step, 0) for step in range(STEPS)]
    collate_seeds = [collate_seed(epoch_seed(SEED, 0), first) for first in (0, 2, 4, 6)]
    assert [seed for seed, _ in calls_of(training, "collate")] == collate_seeds
    for method in ("weights", "forward", "loss"):
        assert [seed for seed, _ in calls_of(training, method)] == [steps[0]] * 2 + [steps[1]] * 2
    names = [name for name, _, _ in training if name in ("weights", "forward")]
    assert names == ["weights", "weights", "forward", "forward"] * STEPS, "all weights come first"
    pair = [[(2, 3), (2, 2)]]
    assert {repr(shapes) for _, shapes in calls_of(training, "weights")} == {repr(pair)}
    assert {repr(shapes) for _, shapes in calls_of(training, "forward")} == {
        repr(["Sequential", *pair])
    }
    assert {repr(shapes) for _, shapes in calls_of(training, "loss")} == {repr([(2, 2), *pair])}
    sample = [(3,), (2,)]
    assert {repr(shapes) for _, shapes in calls_of(training, "collate")} == {
        repr([[sample, sample]])
    }
    for method in ("weights", "forward", "loss", "metrics"):
        assert {seed for seed, _ in calls_of(evaluation, method)} == {evaluation_seed(SEED, 0)}, (
            method
        )
    assert calls_of(evaluation, "metrics")[0][1] == [(3, 2), [(3, 3), (3, 2)]]
    base = evaluation_data_seed(SEED)
    assert [seed for seed, _ in calls_of(evaluation, "collate")] == [collate_seed(base, 0)]


def test_seeds_and_shapes_of_a_partitioned_model() -> None:
    """Each layer has its own generator, and the loss continues with that of the last layer."""
    hybrid = {"name": "hybrid", "pipeline": 1, "micro_batches": 2}
    calls = run(RecordingTask, hybrid, 1)
    micro_batch_seeds = [
        derive_seed(derive_seed(SEED, step, 0), number)
        for step in range(STEPS)
        for number in (0, 1)
    ]
    losses = calls_of(calls, "loss")
    assert {seed for seed, _ in losses} >= {derive_seed(seed, 0) for seed in micro_batch_seeds}
    assert repr([(2, 2), (2, 2)]) in {repr(shapes) for _, shapes in losses}
    figures = calls_of(calls, "metrics")
    assert {seed for seed, _ in figures} == {derive_seed(0, 0)}, "independent of the job's seed"
    shapes = {repr(shapes) for _, shapes in figures}
    assert repr([(2, 2), (2, 2)]) in shapes, "micro-batches are as large as in training"
    assert repr([(3, 2), (3, 2)]) not in shapes


class BatchSizeTask(RecordingTask):
    def forward(self, model: nn.Module, batch: Any) -> Any:
        sizes.append(len(batch[0]))
        return model(batch[0])

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.mse_loss(outputs, targets[1])


sizes: list[int] = []


@pytest.mark.parametrize(
    ("workers", "accumulation", "training", "evaluation"),
    [(1, 1, [7], [3]), (2, 1, [4, 3], [2, 1]), (2, 2, [2, 2, 2, 1], [2, 1]), (3, 1, [3, 2, 2], 3)],
)
def test_micro_batch_sizes(
    workers: int, accumulation: int, training: list[int], evaluation: Any
) -> None:
    sizes.clear()
    fields = {"global_batch_size": 7, "steps": 1, "evaluation": {"every_epochs": 0}}
    train(job_of("ring", workers, gradient_accumulation=accumulation, **fields), BatchSizeTask)
    expected = training + ([1] * evaluation if isinstance(evaluation, int) else evaluation)
    assert sorted(sizes) == sorted(expected)


def test_both_tables_list_every_method() -> None:
    methods = {name for name, value in vars(Task).items() if callable(value) and name[0] != "_"}
    assert "loss" in methods and "buffers" in methods
    calls, _, arguments = PAGE.partition("## What each method gets")
    for table in (calls, arguments.partition("\n## ")[0]):
        rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        assert {*re.findall(r"`(\w+)", " ".join(rows))} >= methods | {"__init__"}
