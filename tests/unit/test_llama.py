"""The Llama example matches a plain loop under every strategy."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import train
from torch import Tensor, nn

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.catalog import load_job
from distplat.strategies.task import Task

pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[2] / "examples" / "llama"
SMALL = {"length": 12, "layers": 3, "width": 16, "heads": 2, "pieces": 60}
BATCH, STEPS = 8, 5


@pytest.fixture
def small_task(monkeypatch: pytest.MonkeyPatch) -> type[Task]:
    """Return the task with a small model in float64."""
    monkeypatch.syspath_prepend(FOLDER)
    cls: Any = importlib.import_module("llama").Llama

    class Small(cls):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(**SMALL)

        def model(self) -> nn.Module:
            model: nn.Module = super().model()
            return model.double()

    return Small


def plain_loop(cls: type[Task]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    task: Any = cls()
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    sampler = Sampler(len(data), BATCH, 1, 0, True, False)
    for step in range(STEPS):
        inputs, targets = (
            torch.stack(tensors)
            for tensors in zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        )
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def make_job(strategy: Any, workers: int) -> Job:
    return job_of(
        strategy,
        workers,
        optimizer={"name": "SGD", "lr": 0.3, "momentum": 0.9},
        global_batch_size=BATCH,
        epochs=None,
        steps=STEPS,
        seed=0,
        evaluation={"every_epochs": 0},
    )


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("strategy", "workers"),
    [
        ("ring", 2),
        ("ps-sync", 2),
        ("ps-async", 1),
        ({"name": "hybrid", "pipeline": 2, "micro_batches": 2}, 2),
        ({"name": "hybrid", "pipeline": 2, "data": 2, "micro_batches": 2}, 4),
    ],
    ids=str,
)
def test_matches_plain_loop(strategy: Any, workers: int, small_task: type[Task]) -> None:
    run = train(make_job(strategy, workers), small_task)
    found = {name: value for part in run.trained for name, value in part.items()}
    expected = plain_loop(small_task)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)  # norms are float32


def test_job_file_uses_hybrid_with_two_workers() -> None:
    job = load_job(FOLDER / "job.yaml")
    assert (job.strategy.name, job.scaling.num_workers) == ("hybrid", 2)
