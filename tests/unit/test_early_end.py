"""A run that ends before its last step: all ranks after the same one, and as after a last one."""

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
    """Ends before a step; some ranks are told in time, the others three steps later, if at all."""

    told: tuple[int, ...] = (0, 1)

    def before(self, rank: int, step: int) -> StopOrder:
        told = END - 1 if rank in self.told else END + 2
        return StopOrder.END if step >= told else StopOrder.NONE


def job(strategy: Any, steps: int, world: int = 2, **more: Any) -> Any:
    optimizer = {"name": "AdamW", "lr": 0.05}
    given = {"optimizer": optimizer, "steps": steps, "evaluation": {"every_steps": 4}, **more}
    return job_of(strategy, world, **given)


def evaluated(run: LocalRun) -> list[int]:
    reports = [one for told in run.reports for one in told if isinstance(one, EvalReport)]
    return sorted({one.step for one in reports})


@pytest.mark.sweep(3)
@pytest.mark.parametrize("told", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_the_model_is_that_of_a_run_of_so_many_steps(strategy: Any, told: tuple[int, ...]) -> None:
    run = LocalRun(job(strategy, STEPS), Line)
    attempt = Ending(run)
    attempt.told = told
    assert attempt.make()
    run.close()
    whole = train(job(strategy, END), Line)
    for mine, other in zip(run.trained, whole.trained, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.0, atol=0.0)
    assert evaluated(run) == evaluated(whole) == [4, END]
    assert [rank.progress.step for rank in run.ranks] == [END, END]


def test_an_end_where_an_evaluation_was_due_makes_no_other() -> None:
    run = LocalRun(job("ring", STEPS, evaluation={"every_steps": END}), Line)
    assert Ending(run).make()
    run.close()
    assert evaluated(run) == [END]


class OneIsSlow(Ending):
    """A step is made without the last rank, which skips some."""

    def before(self, rank: int, step: int) -> StopOrder:
        if rank == self.world - 1:
            time.sleep(0.02)
        return super().before(rank, step)


@pytest.mark.parametrize("told", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_with_backup_workers_all_end_with_the_newest_parameters(told: tuple[int, ...]) -> None:
    """What a rank says whose gradient is dropped, the others do not hear: they are told as well."""
    run = LocalRun(job({"name": "ps-sync", "backup_workers": 1}, STEPS, world=3), Line)
    attempt = OneIsSlow(run)
    attempt.told = told
    assert attempt.make()
    run.close()
    first, *others = run.trained
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    (made,) = {rank.progress.step for rank in run.ranks}
    assert END <= made <= STEPS
    for reports in run.reports:  # who came late begins later
        steps = [one.step for one in reports if isinstance(one, StepReport)]
        assert steps == list(range(steps[0], made))


class Told(Attempt):
    """Ranks of a run of one are told before a step."""

    def before(self, rank: int, step: int) -> StopOrder:
        return StopOrder.END if step == END else StopOrder.NONE


def test_a_run_of_one_worker_ends_where_it_is_told() -> None:
    run = LocalRun(job("ring", STEPS, world=1), Line)
    assert Told(run).make()
    run.close()
    assert [rank.progress.step for rank in run.ranks] == [END]


class TellingDesk(Attempt):
    """Where tasks are leased, their scheduler is told."""

    def report(self, rank: int, report: Any) -> None:
        super().report(rank, report)
        if isinstance(report, StepReport) and report.step == 1:
            self.run.desk.call("end_early")


def test_where_tasks_are_leased_the_steps_that_were_begun_are_made() -> None:
    run = LocalRun(job("ps-async", 100), Line)
    assert TellingDesk(run).make()
    run.close()
    steps = {one.step for told in run.reports for one in told if isinstance(one, StepReport)}
    made = max(steps) + 1
    assert steps == set(range(made)) and 2 <= made < 100
    assert evaluated(run)[-1] == made
    assert [rank.progress.step for rank in run.ranks] == [made, made]
    first, second = run.trained
    assert all(torch.equal(first[name], second[name]) for name in first)


class Resized(Attempt):
    """Two ranks stop for a resize; the one that is left is asked to stop before its first step."""

    ends = (Abandoned,)

    def before(self, rank: int, step: int) -> StopOrder:
        if self.world == 1:
            return StopOrder.SAVE
        return StopOrder.RESIZE if step >= END - 1 else StopOrder.NONE


@pytest.mark.parametrize("newest", [0, END])
def test_a_stop_keeps_steps_of_the_attempt_before(newest: int) -> None:
    run = LocalRun(job("ps-sync", STEPS), Line)
    Resized(run).make()
    run.resize(1)
    assert Resized(run, base=newest).make()
    run.close()
    assert [*run.checkpoints] == ([END] if newest < END else [])


@pytest.mark.parametrize("newest", [0, STEPS])
def test_so_does_one_where_tasks_are_leased(newest: int) -> None:
    run = LocalRun(job("ps-async", STEPS), Line)
    assert Attempt(run).make() and not run.checkpoints
    run.desk.call("end_early", True)
    assert Attempt(run, base=newest).make()
    run.close()
    assert [*run.checkpoints] == ([STEPS] if newest < STEPS else [])
