"""Early end: all ranks stop after the same step, with the result of a run of so many steps."""

import time
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import Attempt, LocalRun, train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.platform.errors import Abandoned
from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.stop_order import StopOrder

STEPS, END = 9, 5
HYBRID = {"name": "hybrid", "pipeline": 2, "micro_batches": 2}
STRATEGIES: list[Any] = [
    "ring",
    {"name": "ring", "shard_optimizer": True},
    {"name": "ring", "compression": "topk", "topk_density": 0.5},
    "ps-sync",
    {"name": "ps-sync", "num_servers": 2, "replication": 2},
    HYBRID,
]


class Line(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def train_data(self) -> Dataset[Any]:
        inputs = torch.arange(36.0).view(12, 3) / 36
        return TensorDataset(inputs, inputs.sum(1, keepdim=True))

    def eval_data(self) -> Dataset[Any]:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class Ending(Attempt):
    """Orders the end: ranks in `notified` before step `END`, the others three steps later."""

    notified: tuple[int, ...] = (0, 1)

    def before(self, rank: int, step: int) -> StopOrder:
        order_step = END - 1 if rank in self.notified else END + 2
        return StopOrder.END if step >= order_step else StopOrder.NONE


def job(strategy: Any, steps: int, world: int = 2, **options: Any) -> Any:
    optimizer = {"name": "AdamW", "lr": 0.05}
    fields = {"optimizer": optimizer, "steps": steps, "evaluation": {"every_steps": 4}, **options}
    return job_of(strategy, world, **fields)


def evaluated_steps(run: LocalRun) -> list[int]:
    reports = [r for of_rank in run.reports for r in of_rank if isinstance(r, EvalReport)]
    return sorted({report.step for report in reports})


@pytest.mark.sweep(3)
@pytest.mark.parametrize("notified", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_matches_a_run_of_as_many_steps(strategy: Any, notified: tuple[int, ...]) -> None:
    run = LocalRun(job(strategy, STEPS), Line)
    attempt = Ending(run)
    attempt.notified = notified
    assert attempt.make()
    run.close()
    reference = train(job(strategy, END), Line)
    for trained, expected in zip(run.trained, reference.trained, strict=True):
        torch.testing.assert_close(trained, expected, rtol=0.0, atol=0.0)
    assert evaluated_steps(run) == evaluated_steps(reference) == [4, END]
    assert [rank.progress.step for rank in run.ranks] == [END, END]


def test_early_end_does_not_repeat_an_evaluation() -> None:
    run = LocalRun(job("ring", STEPS, evaluation={"every_steps": END}), Line)
    assert Ending(run).make()
    run.close()
    assert evaluated_steps(run) == [END]


class OneSlowRank(Ending):
    """Backup workers: steps complete without the slow last rank, which skips some."""

    def before(self, rank: int, step: int) -> StopOrder:
        if rank == self.world - 1:
            time.sleep(0.02)
        return super().before(rank, step)


@pytest.mark.parametrize("notified", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_backup_workers_end_with_the_newest_parameters(notified: tuple[int, ...]) -> None:
    """The order of a rank whose gradient is dropped does not reach the others by itself."""
    run = LocalRun(job({"name": "ps-sync", "backup_workers": 1}, STEPS, world=3), Line)
    attempt = OneSlowRank(run)
    attempt.notified = notified
    assert attempt.make()
    run.close()
    first, *others = run.trained
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    (last_step,) = {rank.progress.step for rank in run.ranks}
    assert END <= last_step < STEPS, "the run ends early"
    for reports in run.reports:  # a late rank begins later
        steps = [r.step for r in reports if isinstance(r, StepReport)]
        assert steps == list(range(steps[0], last_step))


class EndsAtStep(Attempt):
    """Orders the end before step `END`."""

    def before(self, rank: int, step: int) -> StopOrder:
        return StopOrder.END if step == END else StopOrder.NONE


def test_single_worker_ends_at_the_ordered_step() -> None:
    run = LocalRun(job("ring", STEPS, world=1), Line)
    assert EndsAtStep(run).make()
    run.close()
    assert [rank.progress.step for rank in run.ranks] == [END]


class EndsLeases(Attempt):
    """Orders the end through the task scheduler, after step 1."""

    def report(self, rank: int, report: Any) -> None:
        super().report(rank, report)
        if isinstance(report, StepReport) and report.step == 1:
            self.run.task_scheduler.call("end_early")


def test_started_steps_of_leases_are_completed() -> None:
    run = LocalRun(job("ps-async", 100), Line)
    assert EndsLeases(run).make()
    run.close()
    steps = {r.step for of_rank in run.reports for r in of_rank if isinstance(r, StepReport)}
    count = max(steps) + 1
    assert steps == set(range(count)) and 2 <= count < 100
    assert evaluated_steps(run)[-1] == count
    assert [rank.progress.step for rank in run.ranks] == [count, count]
    first, second = run.trained
    assert all(torch.equal(first[name], second[name]) for name in first)


class Resized(Attempt):
    """Two ranks stop for a resize; the remaining one is stopped before its first step."""

    ends = (Abandoned,)

    def before(self, rank: int, step: int) -> StopOrder:
        if self.world == 1:
            return StopOrder.SAVE
        return StopOrder.RESIZE if step >= END - 1 else StopOrder.NONE


@pytest.mark.parametrize("newest", [0, END])
def test_stop_saves_steps_of_the_previous_attempt(newest: int) -> None:
    run = LocalRun(job("ps-sync", STEPS), Line)
    Resized(run).make()
    run.resize(1)
    assert Resized(run, base=newest).make()
    run.close()
    assert [*run.checkpoints] == ([END] if newest < END else [])


@pytest.mark.parametrize("newest", [0, STEPS])
def test_stop_saves_leased_steps_of_the_previous_attempt(newest: int) -> None:
    run = LocalRun(job("ps-async", STEPS), Line)
    assert Attempt(run).make() and not run.checkpoints
    run.task_scheduler.call("end_early", True)
    assert Attempt(run, base=newest).make()
    run.close()
    assert [*run.checkpoints] == ([STEPS] if newest < STEPS else [])
