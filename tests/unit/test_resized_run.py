"""Resizing a run while it trains keeps each step's samples and the model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from jobs import job_of
from local_run import train
from resized_run import train_resized
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.progress import EvalSummary, StepSummary
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Consistency, Job
from distplat.strategies.loop.control import StepControl
from distplat.strategies.task import Task

SAMPLES, BATCH, EPOCHS = 26, 7, 3
PER_EPOCH = 4  # the last batch has five samples
STEPS = PER_EPOCH * EPOCHS


class Numbered(Task):
    """The first column of a sample is its number."""

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 5, generator=generator, dtype=torch.float64)
        inputs[:, 0] = torch.arange(SAMPLES)
        return TensorDataset(inputs, torch.randint(0, 3, (SAMPLES,), generator=generator))

    def eval_data(self) -> TensorDataset:
        return self.train_data()

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


def numbers(inputs: Tensor) -> list[int]:
    return [int(number) for number in inputs[:, 0]]


def make_job(**overrides: Any) -> Job:
    fields: dict[str, Any] = {
        "strategy": {"name": "ps-sync", "num_servers": 2},
        "optimizer": {"name": "AdamW", "lr": 0.02},
        "epochs": EPOCHS,
        "global_batch_size": BATCH,
        **overrides,
    }
    return job_of(**fields)


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("strategy", "clip_norm"),
    [
        ({"name": "ps-sync"}, None),
        ({"name": "ps-sync", "num_servers": 2}, None),
        ({"name": "ps-sync", "num_servers": 2}, 0.2),
    ],
    ids=["one server", "two servers", "two phases"],
)
@pytest.mark.parametrize(
    "schedule",
    [
        [(2, 2), (3, 7), (1, 0)],
        [(2, 4), (3, 5), (5, 8), (1, 11), (2, 0)],  # between two epochs; before the last step
        [(3, 1), (2, 2), (2, 3), (4, 0)],  # in the first steps
    ],
    ids=["2-3-1", "2-3-5-1-2", "3-2-2-4"],
)
def test_resized_run_matches_one_worker(
    schedule: list[tuple[int, int]], strategy: dict[str, Any], clip_norm: float | None
) -> None:
    job = make_job(strategy=strategy, clip_norm=clip_norm)
    run = train_resized(job, Numbered, schedule, numbers)

    assert sorted(run.pushed) == _expected_pushes(schedule), "no gradient was discarded"
    steps = [summary for summary in run.summaries if isinstance(summary, StepSummary)]
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    order = Sampler(SAMPLES, BATCH, 1)
    assert [step.samples for step in steps] == [order.batch_size(step) for step in range(STEPS)]
    for step in range(STEPS):
        assert _samples_of(run.seen, step) == sorted(order.batch_ids(step).tolist())
    for epoch in range(EPOCHS):
        epoch_steps = range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH)
        samples = [sample for step in epoch_steps for sample in _samples_of(run.seen, step)]
        assert sorted(samples) == list(range(SAMPLES))
    evaluations = [s for s in run.summaries if isinstance(s, EvalSummary)]
    assert [(e.step, e.samples) for e in evaluations] == [(4, SAMPLES), (8, SAMPLES), (12, SAMPLES)]

    expected = train(job.with_workers(1), Numbered)
    for parameters in run.parameters:
        for name, value in expected.parameters().items():
            assert torch.allclose(parameters[name], value, rtol=1e-9, atol=1e-12), name
    for summary, loss in zip(steps, _losses(expected.reports[0]), strict=True):
        assert summary.loss == pytest.approx(loss, rel=1e-9)


def _expected_pushes(schedule: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (step, rank) of each gradient, if each started step is completed."""
    ends = [*(stop for _, stop in schedule[:-1]), STEPS]
    worlds = {
        s: w for (w, _), end in reversed([*zip(schedule, ends, strict=True)]) for s in range(end)
    }
    return [(step, rank) for step in range(STEPS) for rank in range(worlds[step])]


def _samples_of(seen: dict[tuple[int, int], list[int]], step: int) -> list[int]:
    """Return the samples of a completed step; only one world size completed it."""
    (world,) = [world for number, world in seen if number == step and seen[number, world]]
    return sorted(seen[step, world])


def _losses(reports: list[Any]) -> list[float]:
    return [report.loss for report in reports if hasattr(report, "loss")]


def test_backup_workers_scale_a_step_by_the_new_world() -> None:
    """A step waits for three of four workers, and their sum is scaled to a mean over four."""
    from distplat.platform.ledger import PushId
    from distplat.platform.shard_map import ShardPlan
    from distplat.strategies.server.dense_store import DenseStore

    job = make_job(optimizer={"name": "SGD", "lr": 1.0}).with_workers(2)
    plan = ShardPlan(job, "run", 0, 2, STEPS, 1, Consistency(backup_workers=1))
    shard = DenseStore(plan, torch.zeros(3))
    shard.restore(0)
    record = StepControl(2.0, 1.0, present=np.ones(1, np.bool_))  # one sample of the batch's two
    shard.push(PushId("run", 0, 1, 0), torch.ones(3), record)
    assert shard.commit(0, None)
    assert shard.params.tolist() == [-2.0] * 3  # one of two ranks
    shard.renew(1, 4)
    for rank in (0, 2, 3):
        shard.push(PushId("run", 1, rank, 1), torch.ones(3), replace(record, samples=4.0))
    assert shard.commit(1, None)
    assert shard.params.tolist() == [-2.0 - 3 * 4 / 3] * 3
