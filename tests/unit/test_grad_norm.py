"""`clip_norm: .inf` has the gradient's norm in the metrics, and changes no bit of the training."""

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


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


class Small(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(WIDE)

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(drawn(SAMPLES, 3, seed=1), drawn(SAMPLES, 2, seed=2))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def job(strategy: Any, workers: int = 2, **more: Any) -> Job:
    optimizer = {"name": "SGD", "lr": 0.3}
    given = {"steps": STEPS, "global_batch_size": BATCH, "optimizer": optimizer, "seed": 3}
    return job_of(strategy, workers, **{**given, **more})


def norms_of_torch() -> list[float]:
    """Train in one process with `clip_grad_norm_(parameters, inf)`; give what it returns."""
    torch.manual_seed(3)
    task, norms = Small(), []
    model, data = task.model(), task.train_data()
    rule = torch.optim.SGD(model.parameters(), lr=0.3)
    sampler = Sampler(SAMPLES, BATCH, world=1, seed=3)
    for step in range(STEPS):
        inputs, targets = data[sampler.batch_ids(step).tolist()]
        rule.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), math.inf)))
        rule.step()
    return norms


def norms(run: LocalRun) -> list[float]:
    reports = [one for one in run.reports[0] if isinstance(one, StepReport)]
    return [one.figures["grad_norm"] for one in reports]


def check_same_bits(mine: LocalRun, other: LocalRun) -> None:
    for one, its in zip(mine.trained, other.trained, strict=True):
        torch.testing.assert_close(one, its, rtol=0.0, atol=0.0, equal_nan=True)


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
def test_the_norm_is_torchs_and_nothing_is_clipped(strategy: Any, workers: int) -> None:
    run = train(job(strategy, workers, clip_norm=math.inf), Small)
    assert norms(run) == pytest.approx(norms_of_torch(), rel=1e-10)
    without = train(job(strategy, workers), Small)
    check_same_bits(run, without)
    told = [one for one in without.reports[0] if isinstance(one, StepReport)]
    assert not any("grad_norm" in one.figures for one in told)


def test_a_gradient_that_overflows_is_not_made_nan_by_it() -> None:
    class Huge(Small):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return 1e300 * nn.functional.mse_loss(outputs, targets)

    more = {"failure": {"non_finite": "ignore"}, "steps": 1}
    run = train(job("ring", 1, clip_norm=math.inf, **more), Huge)
    assert norms(run) == [math.inf], "its square is too large for a float"
    check_same_bits(run, train(job("ring", 1, **more), Huge))


def of_yaml(job: Job) -> Job:
    return Job.model_validate(yaml.safe_load(render_job(job)))


def of_json(job: Job) -> Job:
    fields = yaml.safe_load(to_json(job.model_dump(mode="json")))
    return Job.model_validate(fields)


@pytest.mark.parametrize("way", [of_yaml, of_json])
def test_it_reads_back(way: Callable[[Job], Job]) -> None:
    """What a dry run prints, trackers are told and a run directory keeps has it."""
    assert way(job("ring", clip_norm=math.inf)).clip_norm == math.inf
    assert way(job("ring", clip_norm=0.5)).clip_norm == 0.5
    assert way(job("ring")).clip_norm is None


@pytest.mark.parametrize("text", [".inf", ".INF", "+.inf"])
def test_a_job_file_says_it_in_yaml(text: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(fields_of("ring")) + f"clip_norm: {text}\n")
    assert read_job(file).clip_norm == math.inf


@pytest.mark.parametrize("value", [-math.inf, math.nan, 0.0, True, "nan"])
def test_what_is_no_limit_is_refused(value: Any) -> None:
    with pytest.raises(SpecError, match="clip_norm"):
        job_of("ring", clip_norm=value)


def test_a_run_with_it_goes_on(tmp_path: Path) -> None:
    checkpoint = {"every_steps": 2}
    given = {**FIELDS, "storage_path": str(tmp_path), "checkpoint": checkpoint, "steps": 2}
    first = Trainer({**given, "clip_norm": math.inf}, Evaluated).fit()
    again = Trainer({**given, "steps": 4, "clip_norm": math.inf}, Evaluated, resume=first.path)
    assert [step.step for step in again.fit().history] == [3, 4]
