"""What docs/task.md says of each method: what it gets, of which shape, and under which seed."""

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

Said = list[tuple[str, int, Any]]
"""Of each call: the method, torch's seed, and the shapes of what it got."""


def shape_of(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [shape_of(one) for one in value]
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


class Telling(Task):
    """Says how each method is called; one rank alone, for threads share the generator."""

    said: ClassVar[Said] = []

    def note(self, method: str, *given: Any) -> None:
        self.said.append((method, torch.initial_seed(), [shape_of(one) for one in given]))

    def __init__(self) -> None:
        self.note("__init__")

    def model(self) -> nn.Module:
        self.note("model")
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def train_data(self) -> Dataset[Any]:
        self.note("train_data")
        return TensorDataset(torch.ones(SAMPLES, 3), torch.ones(SAMPLES, 2))

    def eval_data(self) -> Dataset[Any]:
        self.note("eval_data")
        return TensorDataset(torch.ones(3, 3), torch.ones(3, 2))

    def collate(self, samples: list[Any]) -> Any:
        self.note("collate", samples)
        return super().collate(samples)

    def loss(self, outputs: Any, targets: Any) -> Any:
        self.note("loss", outputs, targets)
        return nn.functional.mse_loss(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        self.note("metrics", outputs, targets)
        return {"one": 1.0}


class Whole(Telling):
    """With what not every strategy takes."""

    def sampler(self, data: Any, epoch: int) -> Any:
        self.note("sampler", data, epoch)
        return torch.arange(SAMPLES)

    def lr(self, step: int, total: int) -> float:
        self.note("lr", step, total)
        return 1.0

    def forward(self, model: nn.Module, batch: Any) -> Any:
        self.note("forward", model, batch)
        return model(batch[0])

    def loss(self, outputs: Any, targets: Any) -> Any:
        self.note("loss", outputs, targets)
        return {"all": nn.functional.mse_loss(outputs, targets[1], reduction="sum")}

    def weights(self, batch: Any) -> dict[str, float]:
        self.note("weights", batch)
        return {"all": float(len(batch[0]))}


class Own(Whole):
    def optimizer(self, named_parameters: Any) -> torch.optim.Optimizer:
        self.note("optimizer", *named_parameters[0])
        return torch.optim.SGD([one for _, one in named_parameters], lr=0.1)


def run(kind: type[Telling], strategy: Any, accumulation: int = 2, **more: Any) -> Said:
    Telling.said = []
    given = {"steps": STEPS, "global_batch_size": BATCH, "seed": SEED, **more}
    train(job_of(strategy, 1, gradient_accumulation=accumulation, **given), kind)
    return Telling.said


def in_training(said: Said, evaluations: int = 1) -> tuple[Said, Said]:
    """Cut at the first collate of each: training, and the evaluation at the run's end."""
    begun = [at for at, one in enumerate(said) if one[0] == "collate"]
    return said[: begun[-evaluations]], said[begun[-evaluations] :]


def of(said: Said, method: str) -> list[tuple[int, Any]]:
    return [(seed, shapes) for name, seed, shapes in said if name == method]


ONCE = ["__init__", "model", "train_data", "eval_data", "lr", "optimizer"]


@pytest.mark.parametrize(
    ("strategy", "kind", "optimizer"),
    [
        ("ring", Own, {"name": "task"}),
        ("ps-sync", Whole, {"name": "SGD", "lr": 0.1}),
        ("ps-async", Whole, {"name": "SGD", "lr": 0.1}),
    ],
)
def test_seeds_and_shapes_of_a_whole_model(
    strategy: str, kind: type[Telling], optimizer: dict[str, Any]
) -> None:
    training, evaluation = in_training(run(kind, strategy, optimizer=optimizer))
    for method in ONCE:
        calls = of(training, method)
        assert bool(calls) == (method != "optimizer" or strategy == "ring")
        assert {seed for seed, _ in calls} <= {SEED}, method
    assert {seed for seed, _ in of(training, "sampler")} == {order_seed(SEED, 0)}
    steps = [step_seed(SEED, step, 0) for step in range(STEPS)]
    first_of = [collate_seed(epoch_seed(SEED, 0), first) for first in (0, 2, 4, 6)]
    assert [seed for seed, _ in of(training, "collate")] == first_of
    for method in ("weights", "forward", "loss"):
        assert [seed for seed, _ in of(training, method)] == [steps[0]] * 2 + [steps[1]] * 2
    names = [name for name, _, _ in training if name in ("weights", "forward")]
    assert names == ["weights", "weights", "forward", "forward"] * STEPS, "all weights come first"
    pair = [[(2, 3), (2, 2)]]
    assert {repr(shapes) for _, shapes in of(training, "weights")} == {repr(pair)}
    assert {repr(shapes) for _, shapes in of(training, "forward")} == {repr(["Sequential", *pair])}
    assert {repr(shapes) for _, shapes in of(training, "loss")} == {repr([(2, 2), *pair])}
    sample = [(3,), (2,)]
    assert {repr(shapes) for _, shapes in of(training, "collate")} == {repr([[sample, sample]])}
    for method in ("weights", "forward", "loss", "metrics"):
        assert {seed for seed, _ in of(evaluation, method)} == {evaluation_seed(SEED, 0)}, method
    assert of(evaluation, "metrics")[0][1] == [(3, 2), [(3, 3), (3, 2)]]
    base = evaluation_data_seed(SEED)
    assert [seed for seed, _ in of(evaluation, "collate")] == [collate_seed(base, 0)]


def test_seeds_and_shapes_of_a_model_that_is_cut() -> None:
    """Each layer has a generator of its own: what comes after goes on with the last one's."""
    hybrid = {"name": "hybrid", "pipeline": 1, "micro_batches": 2}
    said = run(Telling, hybrid, 1)
    numbered = [
        derive_seed(derive_seed(SEED, step, 0), number)
        for step in range(STEPS)
        for number in (0, 1)
    ]
    losses = of(said, "loss")
    assert {seed for seed, _ in losses} >= {derive_seed(one, 0) for one in numbered}
    assert repr([(2, 2), (2, 2)]) in {repr(shapes) for _, shapes in losses}
    figures = of(said, "metrics")
    assert {seed for seed, _ in figures} == {derive_seed(0, 0)}, "whatever the job's seed is"
    shapes = {repr(shapes) for _, shapes in figures}
    assert repr([(2, 2), (2, 2)]) in shapes, "micro-batches are as large as in training"
    assert repr([(3, 2), (3, 2)]) not in shapes


class Sized(Telling):
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
def test_the_samples_of_a_micro_batch(
    workers: int, accumulation: int, training: list[int], evaluation: Any
) -> None:
    sizes.clear()
    given = {"global_batch_size": 7, "steps": 1, "evaluation": {"every_epochs": 0}}
    train(job_of("ring", workers, gradient_accumulation=accumulation, **given), Sized)
    expected = training + ([1] * evaluation if isinstance(evaluation, int) else evaluation)
    assert sorted(sizes) == sorted(expected)


def test_both_tables_of_the_page_have_every_method() -> None:
    methods = {name for name, one in vars(Task).items() if callable(one) and name[0] != "_"}
    assert "loss" in methods and "buffers" in methods
    calls, _, arguments = PAGE.partition("## What each method gets")
    for table in (calls, arguments.partition("\n## ")[0]):
        rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        assert {*re.findall(r"`(\w+)", " ".join(rows))} >= methods | {"__init__"}
