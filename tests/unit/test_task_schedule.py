"""`Task.lr`: learning rates equal those of torch's `LambdaLR` under every strategy."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_jobs import job as table_job
from grouped_task import (
    SCALES,
    STEPS,
    STRATEGIES,
    Small,
    assert_close,
    job,
    train_with_param_groups,
)
from jobs import job_of
from local_run import train
from table_rows import table_rows
from words import ROWS, Words

from distplat import Task, Trainer
from distplat.actors.task_check import check_class, overlapping_fields
from distplat.platform.errors import SpecError
from distplat.platform.progress import StepReport
from distplat.strategies.loop.session import prepare, resize
from distplat.strategies.loop.task_warnings import job_warnings
from distplat.strategies.worker_strategy import make_worker_strategy


class LrTask(Small):
    def lr(self, step: int, total: int) -> float:
        assert total == STEPS
        return SCALES[step]


def lr_job(strategy: Any = "ring", world: int = 1, **more: Any) -> Any:
    return job(strategy, world, lr_schedule={}, **more)


@pytest.mark.parametrize("name", STRATEGIES)
def test_run_matches_plain_loop_with_lambda_lr(name: str) -> None:
    """`plain` also scales the rates of param groups."""
    run = train(lr_job(*STRATEGIES[name]), LrTask)
    assert_close(run.parameters(), train_with_param_groups(Small))


def test_lr_of_each_group_is_reported() -> None:
    run = train(lr_job(), LrTask)
    steps = [report for report in run.reports[0] if isinstance(report, StepReport)]
    assert [report.figures["lr"] for report in steps] == [0.05 * scale for scale in SCALES]
    assert [report.figures["lr_group_1"] for report in steps] == [0.01 * scale for scale in SCALES]


class LinearTask(Words):
    """The same factors as the schedule `linear`."""

    def lr(self, step: int, total: int) -> float:
        return 1.0 - step / (total - 1)


@pytest.mark.parametrize("more", [{}, {"asynchronous": True}])
def test_tables_use_the_tasks_rates(more: dict[str, Any]) -> None:
    tables = {"servers": 2, "optimizer": {"name": "SGD", "lr": 0.5}, **more}
    named = train(table_job(Words, 1, lr_schedule={"name": "linear"}, embeddings=tables), Words)
    own = train(table_job(Words, 1, lr_schedule={}, embeddings=tables), LinearTask)
    constant = train(table_job(Words, 1, lr_schedule={}, embeddings=tables), Words)
    assert torch.equal(own.parameters()["head.weight"], named.parameters()["head.weight"])
    for number in range(2):
        rows = [table_rows(run.tables, number, ROWS) for run in (own, named, constant)]
        assert rows[0].tobytes() == rows[1].tobytes() != rows[2].tobytes()


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers"])
def test_resumed_run_is_bit_identical(name: str) -> None:
    spec = lr_job(*STRATEGIES[name], checkpoint={"every_steps": 2})
    reference = train(spec, LrTask)
    resumed = train(spec, LrTask, saved=reference.checkpoints[4])
    for key, value in reference.parameters().items():
        assert torch.equal(resumed.parameters()[key], value), key


def test_resized_attempt_keeps_the_rates() -> None:
    spec = lr_job("ps-sync", 2)
    strategy = make_worker_strategy(spec)
    prepared = prepare(spec, LrTask(), strategy=strategy)
    resize(prepared, spec.with_workers(1), strategy)
    assert prepared.job.scaling.num_workers == 1
    assert prepared.job.task_schedule is not None
    assert [*prepared.job.task_schedule.factors] == SCALES


def test_prepared_job_pickles_with_its_factors() -> None:
    prepared = prepare(lr_job(), LrTask()).job
    assert pickle.loads(pickle.dumps(prepared)) == prepared != lr_job()  # noqa: S301  our own


def test_run_in_the_driver_process_uses_the_rates(tmp_path: Path) -> None:
    spec = lr_job("ps-sync", 0, storage_path=str(tmp_path))
    result = Trainer(spec, LrTask).fit()
    rates = [record.figures["lr"] for record in result.history]
    assert rates == [0.05 * scale for scale in SCALES]


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (None, "got a NoneType for step 0: is there a `return`?"),
        ("0.1", "got a str for step 0"),
        (True, "got a bool for step 0"),
        (torch.tensor(0.5), "got a Tensor for step 0"),
        (float("nan"), "got nan for step 0"),
        (float("inf"), "got inf for step 0"),
        (-0.5, "got -0.5 for step 0"),
    ],
)
def test_invalid_factor_is_rejected(factor: Any, message: str) -> None:
    class InvalidTask(Small):
        def lr(self, step: int, total: int) -> float:
            return factor  # type: ignore[no-any-return]

    with pytest.raises(ValueError) as caught:
        prepare(lr_job(), InvalidTask())
    line = InvalidTask.lr.__code__.co_firstlineno
    location = f"test_task_schedule.py:{line}: "
    assert str(caught.value) == f"{location}lr() must return a number, 0 or more; {message}"


def test_attribute_named_lr_is_no_schedule() -> None:
    """Many tasks store the learning rate of `task_args` as `self.lr`."""

    class StoresLr(Small):
        def __init__(self, lr: float = 0.3) -> None:
            self.lr = lr  # type: ignore[assignment,method-assign]

    class StoresLrWithSchedule(StoresLr, LrTask):
        pass

    assert prepare(lr_job(), StoresLr()).job.task_schedule is None
    schedule = prepare(lr_job(), StoresLrWithSchedule()).job.task_schedule
    assert schedule is not None and [*schedule.factors] == SCALES


def test_factors_that_differ_between_ranks_are_rejected() -> None:
    class RankDependent(Small):
        instances = 0

        def __init__(self) -> None:
            type(self).instances += 1
            self.number = self.instances

        def lr(self, step: int, total: int) -> float:
            return 1.0 / self.number

    with pytest.raises(SpecError, match=r"lr\(\) gives worker-\d something else than worker-\d"):
        train(lr_job("ring", 2), RankDependent)


def test_lr_schedule_and_task_lr_are_exclusive() -> None:
    spec = job_of(lr_schedule={"name": "cosine"})
    check_class(Small, {}, overlapping_fields(spec))
    check_class(LrTask, {}, overlapping_fields(job_of()))
    with pytest.raises(SpecError) as caught:
        check_class(LrTask, {}, overlapping_fields(spec))
    message = (
        "lr_schedule: LrTask has lr(), which says the rates itself\n  hint: remove one of the two"
    )
    assert str(caught.value) == message


def test_lr_must_take_step_and_total() -> None:
    cls: type[Task] = type("Wrong", (Small,), {"lr": lambda self, step: 1.0})
    with pytest.raises(SpecError, match=r"Wrong: lr\(\) must take \(step, total\)"):
        check_class(cls, {})


@pytest.mark.parametrize(("largest", "is_warned"), [(1.0, False), (0.1, False), (0.05, True)])
def test_absolute_rates_have_a_warning(largest: float, is_warned: bool) -> None:
    class Scaled(Small):
        def lr(self, step: int, total: int) -> float:
            return largest / (step + 1)

    prepared = prepare(lr_job(), Scaled())
    warnings = job_warnings(prepared.job, prepared.sampler)
    text = "lr() gives factors of the optimizer's lr, and the largest is 0.05: no rate is above "
    assert warnings == ([text + "0.05 x 0.05"] if is_warned else [])
