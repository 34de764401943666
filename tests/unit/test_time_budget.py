"""Runs with `max_time_s` and without a number of steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of
from line_task import FIELDS, Evaluated
from local_run import Attempt, LocalRun, evaluations, train
from safetensors.torch import load_file
from torch.utils.data import Dataset, IterableDataset

from distplat import Callback, Trainer
from distplat.platform.checkpoints import Catalogue
from distplat.platform.errors import SpecError
from distplat.platform.progress import UNBOUNDED, StepReport, StepSummary
from distplat.platform.resume import mismatches
from distplat.platform.sampler import ENDLESS, Sampler
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.platform.task_scheduler import TaskPlan, TaskScheduler
from distplat.strategies.loop.loop import task_plan
from distplat.strategies.loop.task_warnings import length_warning, schedule_facts

END = 5
STRATEGIES: list[Any] = [
    "ring",
    {"name": "ring", "shard_optimizer": True},
    {"name": "ps-sync", "num_servers": 2, "replication": 2},
    {"name": "hybrid", "pipeline": 1, "data": 2},
]


def fields(**more: Any) -> dict[str, Any]:
    return {**FIELDS, "steps": None, "max_time_s": 3600, **more}


def job(strategy: Any, **more: Any) -> Job:
    options = {"steps": None, "max_time_s": 3600, "evaluation": {"every_steps": 2}, **more}
    return job_of(strategy, 2, **options)


class ExpiresInStepEnd(Attempt):
    """`max_time_s` expires in step END on all ranks."""

    def before(self, rank: int, step: int) -> StopOrder:
        return StopOrder.END if step >= END - 1 else StopOrder.NONE


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_model_equals_that_of_a_run_with_the_same_steps(strategy: Any) -> None:
    schedule = {"name": "StepLR", "step_size": 2, "gamma": 0.5, "warmup_steps": 1}
    run = LocalRun(job(strategy, lr_schedule=schedule), Evaluated)
    assert ExpiresInStepEnd(run).make()
    run.close()
    more = {"steps": END, "max_time_s": None, "lr_schedule": schedule}
    reference = train(job(strategy, **more), Evaluated)
    for actual, expected in zip(run.trained, reference.trained, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)
    assert evaluations(run) == evaluations(reference)
    assert {report.of for report in run.reports[0] if isinstance(report, StepReport)} == {0}


class EndsEarlyAfterStep1(Attempt):
    def report(self, rank: int, report: Any) -> None:
        super().report(rank, report)
        if isinstance(report, StepReport) and report.step == 1:
            self.run.task_scheduler.call("end_early")


@pytest.mark.parametrize("evaluation", [{"every_steps": 2}, {"every_epochs": 0}])
def test_ps_async_completes_the_steps_in_progress(
    evaluation: dict[str, int],
) -> None:
    more = {**evaluation, "before_first": True}
    run = LocalRun(job("ps-async", evaluation=more), Evaluated)
    assert EndsEarlyAfterStep1(run).make()
    run.close()
    steps = {r.step for reports in run.reports for r in reports if isinstance(r, StepReport)}
    num_steps = max(steps) + 1
    assert steps == set(range(num_steps)), "all tasks of the steps in progress"
    due_steps = range(0, num_steps, 2) if "every_steps" in evaluation else [0]
    assert [report.step for report in evaluations(run)] == [*due_steps, num_steps]


def plan_of(first: int = 0, **evaluation: Any) -> TaskPlan:
    return task_plan(
        job("ps-async", evaluation=evaluation), Sampler(8, 4, 2), UNBOUNDED, first, evaluates=True
    )


def evaluation_range(plan: TaskPlan) -> tuple[int, int, int]:
    due = plan.evaluations
    assert isinstance(due, range)
    return due.start, due.stop, due.step


def test_evaluations_of_an_unbounded_run_are_a_range() -> None:
    assert evaluation_range(plan_of(every_steps=3)) == (3, UNBOUNDED + 1, 3)
    assert evaluation_range(plan_of(4, every_steps=3)) == (6, UNBOUNDED + 1, 3)
    assert evaluation_range(plan_of(6, every_epochs=2)) == (8, UNBOUNDED + 1, 4)
    assert evaluation_range(plan_of(every_epochs=2, before_first=True)) == (0, UNBOUNDED + 1, 4)
    stream = Sampler(ENDLESS, 4, 2, stream=True)
    for default in (
        job("ps-async", evaluation={}),
        job("ps-async", evaluation={"every_epochs": 1}),
    ):
        plan = task_plan(default, stream, UNBOUNDED, 0, evaluates=True)
        assert evaluation_range(plan) == (UNBOUNDED, UNBOUNDED + 1, UNBOUNDED), (
            "after the last step"
        )
    scheduler = TaskScheduler(plan_of(every_epochs=0))
    assert scheduler.work(0, 0, 3) is not None
    scheduler.finish(0, (0, 1, 2))
    scheduler.end_early()
    assert (scheduler.plan.steps, scheduler.plan.evaluations) == (2, (2,))


class StopAfterStep3(Callback):
    step = 0

    def on_step(self, step: StepSummary) -> None:
        self.step = step.step

    def should_stop(self) -> bool:
        return self.step >= 3


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", "hybrid"])
def test_run_ends_by_time_or_callback_and_resumes(strategy: str, tmp_path: Path) -> None:
    checkpoint = {"every_steps": 1}
    options = fields(strategy=strategy, storage_path=str(tmp_path), checkpoint=checkpoint)
    short = Trainer({**options, "max_time_s": 1e-9}, Evaluated).fit()
    num_steps = short.totals.steps
    assert num_steps == 1 if strategy != "ps-async" else num_steps >= 1
    assert short.stopped == "max_time_s: 1e-09 s are over"
    assert max(report.step for report in short.evaluations) == num_steps
    assert json.loads((short.path / "result.json").read_text())["status"] == "SUCCEEDED"
    resumed = Trainer(options, Evaluated, resume=short.path, callbacks=[StopAfterStep3()]).fit()
    newest = Catalogue(short.path / "checkpoints").steps()[-1]
    assert resumed.history[0].step == newest + 1
    assert resumed.stopped == "StopAfterStep3.should_stop()"
    if strategy == "ring":
        plain = Trainer({**options, "max_time_s": None, "steps": 3}, Evaluated).fit()
        actual, expected = [
            load_file(result.path / "model.safetensors") for result in (resumed, plain)
        ]
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ((torch.ones(4) * i, torch.ones(1)) for i in range(10))


class StreamTask(Evaluated):
    def train_data(self) -> Dataset[Any]:
        return Stream()

    def eval_data(self) -> Any:
        return None


def test_stream_is_read_repeatedly(tmp_path: Path) -> None:
    options = fields(storage_path=str(tmp_path), global_batch_size=4)
    result = Trainer(options, StreamTask, callbacks=[StopAfterStep3()]).fit()
    assert [step.samples for step in result.history] == [4, 4, 4], "all batches are full"


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "linear"},
        {"name": "cosine"},
        {"name": "wsd", "decay_steps": 2},
        {"name": "OneCycleLR", "cycle_momentum": False},
    ],
    ids=lambda schedule: schedule["name"],
)
def test_schedule_over_the_whole_run_is_rejected(schedule: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        job("ring", lr_schedule=schedule)
    (problem,) = caught.value.problems
    assert problem.where == ("lr_schedule",)
    assert f"{schedule['name']!r} follows the number of steps" in problem.message
    job("ring", lr_schedule=schedule, steps=4)


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "constant", "warmup_steps": 2},
        {"name": "step", "every_steps": 2},
        {"name": "CosineAnnealingLR", "T_max": 5},
    ],
)
def test_schedule_without_total_steps_is_accepted(schedule: dict[str, Any]) -> None:
    assert job("ring", lr_schedule=schedule).lr_schedule.name == schedule["name"]


class LrByTotal(Evaluated):
    def lr(self, step: int, total: int) -> float:
        return 1.0 - step / total


def test_task_lr_needs_a_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"max_time_s: alone does not set the number of steps"):
        Trainer(fields(storage_path=str(tmp_path)), LrByTotal).fit()


def test_checkpoint_of_an_unbounded_run_resumes_with_a_warning() -> None:
    unbounded = job("ring")
    state = {"step": 3, **schedule_facts(unbounded, 3, UNBOUNDED)}
    assert length_warning(unbounded, UNBOUNDED, state) == ""
    longer = job("ring", steps=9, lr_schedule={"name": "linear"})
    assert "the checkpoint's run had no number of steps" in length_warning(longer, 9, state)
    problems = [
        str(mismatch) for mismatch in mismatches({**state, "steps_per_epoch": 2}, unbounded)
    ]
    assert not [text for text in problems if "nothing" in text or "steps" in text]
