"""`clip_norm: .inf` records the gradient norm without changing the training."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jobs import fields_of, job_of
from line_task import FIELDS, Evaluated
from local_run import LocalRun, train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task, Trainer
from distplat.platform.errors import SpecError
from distplat.platform.job_file import read_job, render_job
from distplat.platform.progress import StepReport, to_json
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job

WIDE = torch.float64
STEPS, BATCH, SAMPLES = 4, 6, 12


def seeded_randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


class Small(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(WIDE)

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(seeded_randn(SAMPLES, 3, seed=1), seeded_randn(SAMPLES, 2, seed=2))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def job(strategy: Any, workers: int = 2, **options: Any) -> Job:
    optimizer = {"name": "SGD", "lr": 0.3}
    fields = {"steps": STEPS, "global_batch_size": BATCH, "optimizer": optimizer, "seed": 3}
    return job_of(strategy, workers, **{**fields, **options})


def norms_of_torch() -> list[float]:
    """Train in one process; return the results of `clip_grad_norm_(parameters, inf)`."""
    torch.manual_seed(3)
    task, norms = Small(), []
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    sampler = Sampler(SAMPLES, BATCH, world=1, seed=3)
    for step in range(STEPS):
        inputs, targets = data[sampler.batch_ids(step).tolist()]
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), math.inf)))
        optimizer.step()
    return norms


def norms(run: LocalRun) -> list[float]:
    reports = [r for r in run.reports[0] if isinstance(r, StepReport)]
    return [report.figures["grad_norm"] for report in reports]


def check_same_bits(run: LocalRun, expected: LocalRun) -> None:
    for trained, reference in zip(run.trained, expected.trained, strict=True):
        torch.testing.assert_close(trained, reference, rtol=0.0, atol=0.0, equal_nan=True)


STRATEGIES: list[tuple[Any, int]] = [
    ("ring", 2),
    ({"name": "ring", "shard_optimizer": True}, 2),
    ("ps-sync", 2),
    ({"name": "ps-sync", "num_servers": 2, "replication": 2}, 2),
    ({"name": "hybrid", "pipeline": 2, "cut": "even", "micro_batches": 2}, 2),
    ({"name": "hybrid", "pipeline": 1, "data": 2, "data_strategy": "ps-sync"}, 2),
    ("ps-async", 1),
]


@pytest.mark.parametrize(("strategy", "workers"), STRATEGIES, ids=str)
def test_norm_matches_torch_without_clipping(strategy: Any, workers: int) -> None:
    run = train(job(strategy, workers, clip_norm=math.inf), Small)
    assert norms(run) == pytest.approx(norms_of_torch(), rel=1e-10)
    without = train(job(strategy, workers), Small)
    check_same_bits(run, without)
    reports = [r for r in without.reports[0] if isinstance(r, StepReport)]
    assert not any("grad_norm" in report.figures for report in reports)


def test_overflowing_norm_does_not_produce_nan() -> None:
    class Huge(Small):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return 1e300 * nn.functional.mse_loss(outputs, targets)

    fields = {"failure": {"non_finite": "ignore"}, "steps": 1}
    run = train(job("ring", 1, clip_norm=math.inf, **fields), Huge)
    assert norms(run) == [math.inf], "the squared norm overflows"
    check_same_bits(run, train(job("ring", 1, **fields), Huge))


def through_yaml(job: Job) -> Job:
    return Job.model_validate(yaml.safe_load(render_job(job)))


def through_json(job: Job) -> Job:
    fields = yaml.safe_load(to_json(job.model_dump(mode="json")))
    return Job.model_validate(fields)


@pytest.mark.parametrize("round_trip", [through_yaml, through_json])
def test_infinity_round_trips(round_trip: Callable[[Job], Job]) -> None:
    """In dry runs, trackers and run directories."""
    assert round_trip(job("ring", clip_norm=math.inf)).clip_norm == math.inf
    assert round_trip(job("ring", clip_norm=0.5)).clip_norm == 0.5
    assert round_trip(job("ring")).clip_norm is None


@pytest.mark.parametrize("text", [".inf", ".INF", "+.inf"])
def test_infinity_in_a_job_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(fields_of("ring")) + f"clip_norm: {text}\n")
    assert read_job(file).clip_norm == math.inf


@pytest.mark.parametrize("value", [-math.inf, math.nan, 0.0, True, "nan"])
def test_rejects_invalid_limits(value: Any) -> None:
    with pytest.raises(SpecError, match="clip_norm"):
        job_of("ring", clip_norm=value)


def test_run_with_infinite_clip_norm_resumes(tmp_path: Path) -> None:
    checkpoint = {"every_steps": 2}
    fields = {**FIELDS, "storage_path": str(tmp_path), "checkpoint": checkpoint, "steps": 2}
    first = Trainer({**fields, "clip_norm": math.inf}, Evaluated).fit()
    resumed = Trainer({**fields, "steps": 4, "clip_norm": math.inf}, Evaluated, resume=first.path)
    assert [step.step for step in resumed.fit().history] == [3, 4]
