"""`Task.lr`: a run's rates are those of torch's `LambdaLR`, whoever makes the update."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_jobs import job as table_job
from grouped_task import SCALES, STEPS, STRATEGIES, Small, close, job, plain
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


class Rated(Small):
    def lr(self, step: int, total: int) -> float:
        assert total == STEPS
        return SCALES[step]


def rated(strategy: Any = "ring", world: int = 1, **more: Any) -> Any:
    return job(strategy, world, lr_schedule={}, **more)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_is_a_plain_loop_with_torchs_lambda_lr(name: str) -> None:
    """The rates of groups, too; see `plain`."""
    run = train(rated(*STRATEGIES[name]), Rated)
    close(run.parameters(), plain(Small))


def test_rates_are_reported_as_those_of_a_schedule() -> None:
    run = train(rated(), Rated)
    steps = [one for one in run.reports[0] if isinstance(one, StepReport)]
    assert [one.figures["lr"] for one in steps] == [0.05 * scale for scale in SCALES]
    assert [one.figures["lr_group_1"] for one in steps] == [0.01 * scale for scale in SCALES]


class Linear(Words):
    """What the schedule `linear` does."""

    def lr(self, step: int, total: int) -> float:
        return 1.0 - step / (total - 1)


@pytest.mark.parametrize("more", [{}, {"asynchronous": True}])
def test_tables_have_the_same_rates(more: dict[str, Any]) -> None:
    tables = {"servers": 2, "optimizer": {"name": "SGD", "lr": 0.5}, **more}
    named = train(table_job(Words, 1, lr_schedule={"name": "linear"}, embeddings=tables), Words)
    own = train(table_job(Words, 1, lr_schedule={}, embeddings=tables), Linear)
    constant = train(table_job(Words, 1, lr_schedule={}, embeddings=tables), Words)
    assert torch.equal(own.parameters()["head.weight"], named.parameters()["head.weight"])
    for number in range(2):
        rows = [table_rows(run.tables, number, ROWS) for run in (own, named, constant)]
        assert rows[0].tobytes() == rows[1].tobytes() != rows[2].tobytes()


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers"])
def test_it_goes_on_from_a_checkpoint_to_the_same_bits(name: str) -> None:
    of = rated(*STRATEGIES[name], checkpoint={"every_steps": 2})
    unfailed = train(of, Rated)
    resumed = train(of, Rated, saved=unfailed.checkpoints[4])
    for key, value in unfailed.parameters().items():
        assert torch.equal(resumed.parameters()[key], value), key


def test_another_attempt_has_the_rates_too() -> None:
    of = rated("ps-sync", 2)
    strategy = make_worker_strategy(of)
    prepared = prepare(of, Rated(), strategy=strategy)
    resize(prepared, of.with_workers(1), strategy)
    assert prepared.job.scaling.num_workers == 1
    assert prepared.job.task_schedule is not None
    assert [*prepared.job.task_schedule.factors] == SCALES


def test_it_travels_to_servers_as_it_is() -> None:
    told = prepare(rated(), Rated()).job
    assert pickle.loads(pickle.dumps(told)) == told != rated()  # noqa: S301  our own


def test_a_run_in_the_calling_process(tmp_path: Path) -> None:
    of = rated("ps-sync", 0, storage_path=str(tmp_path))
    result = Trainer(of, Rated).fit()
    rates = [one.figures["lr"] for one in result.history]
    assert rates == [0.05 * scale for scale in SCALES]


@pytest.mark.parametrize(
    ("found", "said"),
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
def test_what_is_no_factor_is_said(found: Any, said: str) -> None:
    class Wrong(Small):
        def lr(self, step: int, total: int) -> float:
            return found  # type: ignore[no-any-return]

    with pytest.raises(ValueError) as caught:
        prepare(rated(), Wrong())
    line = Wrong.lr.__code__.co_firstlineno
    place = f"test_task_schedule.py:{line}: "
    assert str(caught.value) == f"{place}lr() must return a number, 0 or more; {said}"


def test_a_task_may_keep_a_number_under_this_name() -> None:
    """As many keep the rate that `task_args` gave."""

    class Keeps(Small):
        def __init__(self, lr: float = 0.3) -> None:
            self.lr = lr  # type: ignore[assignment,method-assign]

    class KeepsAndSays(Keeps, Rated):
        pass

    assert prepare(rated(), Keeps()).job.task_schedule is None
    own = prepare(rated(), KeepsAndSays()).job.task_schedule
    assert own is not None and [*own.factors] == SCALES


def test_ranks_with_other_factors_are_told() -> None:
    class Apart(Small):
        made = 0

        def __init__(self) -> None:
            type(self).made += 1
            self.number = self.made

        def lr(self, step: int, total: int) -> float:
            return 1.0 / self.number

    with pytest.raises(SpecError, match=r"lr\(\) gives worker-\d something else than worker-\d"):
        train(rated("ring", 2), Apart)


def test_job_and_task_must_not_both_say_the_rates() -> None:
    of = job_of(lr_schedule={"name": "cosine"})
    check_class(Small, {}, overlapping_fields(of))
    check_class(Rated, {}, overlapping_fields(job_of()))
    with pytest.raises(SpecError) as caught:
        check_class(Rated, {}, overlapping_fields(of))
    said = "lr_schedule: Rated has lr(), which says the rates itself\n  hint: remove one of the two"
    assert str(caught.value) == said


def test_it_must_take_step_and_total() -> None:
    kind: type[Task] = type("Wrong", (Small,), {"lr": lambda self, step: 1.0})
    with pytest.raises(SpecError, match=r"Wrong: lr\(\) must take \(step, total\)"):
        check_class(kind, {})


@pytest.mark.parametrize(("largest", "said"), [(1.0, False), (0.1, False), (0.05, True)])
def test_rates_in_the_place_of_factors_are_warned_of(largest: float, said: bool) -> None:
    class Scaled(Small):
        def lr(self, step: int, total: int) -> float:
            return largest / (step + 1)

    prepared = prepare(rated(), Scaled())
    found = job_warnings(prepared.job, prepared.sampler)
    text = "lr() gives factors of the optimizer's lr, and the largest is 0.05: no rate is above "
    assert found == ([text + "0.05 x 0.05"] if said else [])
