"""More and fewer workers while a run goes on: the same samples in every step, the same model."""

from typing import Any

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
from distplat.strategies.task import Task

SAMPLES, BATCH, EPOCHS = 26, 7, 3
PER_EPOCH = 4  # the last batch is of five
STEPS = PER_EPOCH * EPOCHS


class Numbered(Task):
    """Every sample has its number in its first column."""

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


def make(**more: Any) -> Job:
    fields: dict[str, Any] = {
        "strategy": {"name": "ps-sync", "num_servers": 2},
        "optimizer": {"name": "AdamW", "lr": 0.02},
        "epochs": EPOCHS,
        "global_batch_size": BATCH,
        **more,
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
    "course",
    [
        [(2, 2), (3, 7), (1, 0)],
        [(2, 4), (3, 5), (5, 8), (1, 11), (2, 0)],  # between two epochs; before the last step
        [(3, 1), (2, 2), (2, 3), (4, 0)],  # as soon as can be
    ],
    ids=["2-3-1", "2-3-5-1-2", "3-2-2-4"],
)
def test_every_sample_of_an_epoch_is_in_one_step_and_the_model_is_the_same(
    course: list[tuple[int, int]], strategy: dict[str, Any], clip_norm: float | None
) -> None:
    job = make(strategy=strategy, clip_norm=clip_norm)
    run = train_resized(job, Numbered, course, numbers)

    assert sorted(run.pushed) == _each_once(course), "a gradient was made for nothing"
    steps = [one for one in run.summaries if isinstance(one, StepSummary)]
    assert [one.step for one in steps] == list(range(1, STEPS + 1))
    order = Sampler(SAMPLES, BATCH, 1)
    assert [one.samples for one in steps] == [order.batch_size(step) for step in range(STEPS)]
    for step in range(STEPS):
        assert _seen(run.seen, step) == sorted(order.batch_ids(step).tolist())
    for epoch in range(EPOCHS):
        each = range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH)
        made = [sample for step in each for sample in _seen(run.seen, step)]
        assert sorted(made) == list(range(SAMPLES))
    evaluations = [one for one in run.summaries if isinstance(one, EvalSummary)]
    assert [(e.step, e.samples) for e in evaluations] == [(4, SAMPLES), (8, SAMPLES), (12, SAMPLES)]

    alone = train(job.with_workers(1), Numbered)
    for mine in run.parameters:
        for name, value in alone.parameters().items():
            assert torch.allclose(mine[name], value, rtol=1e-9, atol=1e-12), name
    for one, other in zip(steps, _losses(alone.reports[0]), strict=True):
        assert one.loss == pytest.approx(other, rel=1e-9)


def _each_once(course: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Give (step, rank) of all gradients of a run, if no step is begun that is not made."""
    ends = [*(stop for _, stop in course[:-1]), STEPS]
    worlds = {
        s: w for (w, _), end in reversed([*zip(course, ends, strict=True)]) for s in range(end)
    }
    return [(step, rank) for step in range(STEPS) for rank in range(worlds[step])]


def _seen(seen: dict[tuple[int, int], list[int]], step: int) -> list[int]:
    """Give the samples of a step that was made; it was made with one number of workers only."""
    (world,) = [world for made, world in seen if made == step and seen[made, world]]
    return sorted(seen[step, world])


def _losses(reports: list[Any]) -> list[float]:
    return [report.loss for report in reports if hasattr(report, "loss")]


def test_with_backup_workers_a_step_is_scaled_by_those_that_there_are() -> None:
    """Four workers, of which a step waits for three: their sum counts as a mean of four."""
    from distplat.platform.ledger import PushId
    from distplat.platform.shard_map import ShardPlan
    from distplat.strategies.server.dense_store import DenseStore

    job = make(optimizer={"name": "SGD", "lr": 1.0}).with_workers(2)
    plan = ShardPlan(job, "run", 0, 2, STEPS, 1, Consistency(backup_workers=1))
    shard = DenseStore(plan, torch.zeros(3))
    shard.restore(0)
    shard.push(PushId("run", 0, 1, 0), torch.ones(3))
    assert shard.commit(0, None)
    assert shard.params.tolist() == [-2.0] * 3  # one of two
    shard.renew(1, 4)
    for rank in (0, 2, 3):
        shard.push(PushId("run", 1, rank, 1), torch.ones(3))
    assert shard.commit(1, None)
    assert shard.params.tolist() == [-2.0 - 3 * 4 / 3] * 3
