"""What a run makes of its evaluations: the best checkpoint, and an early end."""

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import fields_of
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Callback, Job, Result, Task, Trainer
from distplat.platform.checkpoints import Catalogue, deletable_steps
from distplat.platform.errors import SpecError, StorageError
from distplat.platform.evaluations import (
    BestCheckpoint,
    EarlyStop,
    EarlyStopping,
    KeepBest,
    MetricRule,
)
from distplat.platform.progress import EvalSummary

NAN = math.nan
MOST_S = 60.0


@pytest.mark.parametrize(
    "mode, figure, than, by, better",
    [
        ("min", 1.0, None, 0.0, True),
        ("min", 1.0, 2.0, 0.0, True),
        ("min", 2.0, 2.0, 0.0, False),
        ("min", 1.5, 2.0, 0.5, False),
        ("max", 2.0, 1.0, 0.0, True),
        ("max", 1.0, 2.0, 0.0, False),
        ("max", 2.25, 2.0, 0.5, False),
        ("max", NAN, None, 0.0, False),
        ("min", NAN, 2.0, 0.0, False),
    ],
)
def test_which_figure_is_better(
    mode: Any, figure: float, than: float | None, by: float, better: bool
) -> None:
    assert MetricRule(metric="loss", mode=mode).is_better(figure, than, by) is better


def best_of(*events: tuple[str, int] | tuple[str, int, float]) -> BestCheckpoint:
    found = BestCheckpoint(KeepBest(metric="loss", mode="min"))
    for kind, step, *figure in events:
        if kind == "saved":
            found.saved(step)
        else:
            found.evaluated(step, {"loss": figure[0]})
    return found


@pytest.mark.parametrize(
    "events, best, protected",
    [
        ([], None, set()),
        ([("saved", 2)], None, {2}),
        ([("evaluated", 2, 0.5)], None, set()),
        ([("saved", 2), ("evaluated", 2, 0.5)], 2, {2}),
        ([("evaluated", 2, 0.5), ("saved", 2)], 2, {2}),
        ([("saved", 2), ("evaluated", 2, 0.5), ("saved", 4)], 2, {2, 4}),
        ([("saved", 2), ("saved", 4), ("evaluated", 2, 0.5), ("evaluated", 4, 0.25)], 4, {4}),
        ([("saved", 2), ("saved", 4), ("evaluated", 2, 0.5), ("evaluated", 4, 0.75)], 2, {2}),
        # Of equals the first; NaN never; a checkpoint without an evaluation is let go.
        ([("saved", 2), ("evaluated", 2, 0.5), ("saved", 4), ("evaluated", 4, 0.5)], 2, {2}),
        ([("saved", 2), ("evaluated", 2, NAN)], None, set()),
        ([("saved", 2), ("evaluated", 3, 0.5)], None, set()),
        # Evaluations come in any order where tasks are leased.
        ([("saved", 2), ("saved", 4), ("evaluated", 4, 0.5), ("evaluated", 2, 0.25)], 2, {2}),
    ],
)
def test_which_checkpoint_is_the_best(events: Any, best: int | None, protected: set[int]) -> None:
    found = best_of(*events)
    assert (found.step, found.protected) == (best, protected)


def test_what_a_rollback_takes_away_is_the_best_no_more() -> None:
    found = best_of(("saved", 2), ("evaluated", 2, 0.5), ("saved", 4), ("evaluated", 4, 0.25))
    found.retain([2])
    assert (found.step, found.figure) == (2, 0.5)
    found.saved(4)  # written again; its evaluation is told once only
    assert (found.step, found.figure) == (4, 0.25)


def test_a_long_run_remembers_so_much_and_the_best() -> None:
    found = best_of(("saved", 1), ("evaluated", 1, 0.0))
    for step in range(2, 3000):
        found.evaluated(step, {"loss": 1.0})
    assert found.step == 1 and len(found._figures) == 1000


def test_without_a_rule_nothing_is_kept() -> None:
    found = BestCheckpoint(None)
    found.saved(2)
    found.evaluated(2, {"loss": 0.5})
    assert (found.step, found.protected) == (None, set())


def test_the_protected_stay() -> None:
    assert deletable_steps([2, 4, 6, 8], 2, 8) == [2, 4]
    assert deletable_steps([2, 4, 6, 8], 2, 8, {2}) == [4]


BEST = {"metric": "score", "mode": "max"}


@pytest.mark.parametrize(
    "checkpoint, evaluation, told",
    [
        ({"every_steps": 4}, {"every_steps": 2}, ""),
        ({"every_epochs": 2}, {"every_epochs": 1}, ""),
        ({"every_epochs": 1}, {"every_steps": 5}, ""),
        ({}, {}, "checkpoint.keep_best: has no effect without `every_steps` or `every_epochs`"),
        ({"every_steps": 3}, {"every_steps": 2}, "every 3, and evaluated every 2"),
        ({"every_epochs": 1}, {"every_epochs": 2}, "every 1, and evaluated every 2"),
        ({"every_steps": 3}, {"every_epochs": 0}, "needs evaluations during the run"),
    ],
)
def test_a_checkpoint_that_is_not_evaluated_cannot_be_the_best(
    checkpoint: dict[str, int], evaluation: dict[str, int], told: str
) -> None:
    more = {"checkpoint": {**checkpoint, "keep_best": BEST}, "evaluation": evaluation}
    job = Job.model_validate({**fields_of("ring", 1), **more})
    assert told in "; ".join(map(str, job.problems()))
    assert bool(told) is bool(job.problems())


class Scored(Task):
    """Its evaluations give these scores, one after the other."""

    def __init__(self, scores: list[float], evaluates: bool = True) -> None:
        self.scores, self.evaluates = iter(scores), evaluates

    def model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(torch.ones(8, 2), torch.ones(8, 1))

    def eval_data(self) -> Dataset[Any] | None:
        return TensorDataset(torch.ones(2, 2), torch.ones(2, 1)) if self.evaluates else None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"score": next(self.scores)}


class AfterItsCheckpoint(Callback):
    """Holds the run at each evaluation until the checkpoint of that step is on the disk."""

    def on_start(self, job: Job, run: str, path: Path) -> None:
        self.folder, self.last = path / "checkpoints", job.steps

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        if evaluation.step == self.last:
            return  # its checkpoint comes after the last evaluation, and is waited for
        pause, until = threading.Event(), time.monotonic() + MOST_S
        while not (self.folder / f"step-{evaluation.step:06d}").is_dir():
            assert time.monotonic() < until, "its checkpoint was not written"
            pause.wait(0.01)


def spec(tmp_path: Path, scores: list[float], **more: Any) -> dict[str, Any]:
    fields = fields_of("ring", 0, epochs=None, steps=6, global_batch_size=4)
    checkpoint = {"every_steps": 1, "num_to_keep": 1, "keep_best": BEST}
    evaluation = {"every_steps": 1}
    args = {"scores": scores}
    given = {"checkpoint": checkpoint, "evaluation": evaluation, "task_args": args}
    return {**fields, **given, "storage_path": str(tmp_path), **more}


@pytest.mark.parametrize(
    "scores, best, left",
    [
        ([1, 3, 2, 2, 1, 0], 2, [2, 6]),
        ([1, 3, 2, 2, 1, 4], 6, [6]),
        ([5, 3, 2, 2, 1, 4], 1, [1, 6]),
    ],
)
def test_the_best_checkpoint_stays(
    scores: list[float],
    best: int,
    left: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    result = Trainer(spec(tmp_path, scores), Scored, callbacks=[AfterItsCheckpoint()]).fit()
    catalogue = Catalogue(result.path / "checkpoints")
    assert "continues without it" not in caplog.text
    assert result.best_checkpoint == catalogue.path(best)
    assert catalogue.steps() == left
    assert (
        f'"best_checkpoint": "{catalogue.path(best)}"' in (result.path / "result.json").read_text()
    )
    assert f"best checkpoint  {catalogue.path(best)}" in str(result)


def test_the_metric_must_be_one_that_evaluations_give(tmp_path: Path) -> None:
    given = spec(tmp_path, [1.0] * 6)
    given["checkpoint"] = {"every_steps": 1, "keep_best": {"metric": "scor", "mode": "max"}}
    steps = Steps()
    with pytest.raises(SpecError, match=r"no 'scor'.*\n?.*did you mean 'score'\?.*loss, score"):
        Trainer(given, Scored, callbacks=[steps]).fit()
    assert steps.made == 1


class Steps(Callback):
    made = 0

    def on_end(self, result: Result, error: BaseException | None) -> None:
        self.made = result.totals.steps


def test_a_task_without_evaluations_is_refused_before_the_first_step(tmp_path: Path) -> None:
    args, steps = {"scores": [], "evaluates": False}, Steps()
    with pytest.raises(SpecError, match=r"keep_best.*eval_data\(\) gives no data"):
        Trainer(spec(tmp_path, [], task_args=args), Scored, callbacks=[steps]).fit()
    assert steps.made == 0


def test_epochs_and_steps_are_compared_once_the_data_is_known(tmp_path: Path) -> None:
    given = spec(tmp_path, [1.0] * 6, evaluation={"every_epochs": 1})  # of two steps
    with pytest.raises(SpecError, match="every 1, and evaluated every 2"):
        Trainer(given, Scored).fit()


@pytest.mark.parametrize(
    "rule, figures, stops_after",
    [
        ({"mode": "min"}, [3, 2, 1, 1, 1, 1], 6),
        ({"mode": "min", "patience": 1}, [3, 2, 2, 1], 3),
        ({"mode": "max", "patience": 2}, [1, 2, 1, 2, 3], 4),
        ({"mode": "max", "patience": 2, "min_delta": 0.5}, [1, 1.25, 1.5, 2], 3),
        ({"mode": "max", "patience": 2, "min_delta": 0.5}, [1, 1.25, 1.75, 2], None),
        ({"mode": "min", "patience": 2}, [NAN, NAN], 2),
        ({"mode": "min", "patience": 2}, [1, NAN, 0.5, NAN, 0.25], None),
    ],
)
def test_when_a_run_ends_early(
    rule: dict[str, Any], figures: list[float], stops_after: int | None
) -> None:
    stopping = EarlyStopping(EarlyStop(metric="loss", **rule))
    answers = [stopping.evaluated(n, {"loss": one}) for n, one in enumerate(figures, 1)]
    first = next((n for n, answer in enumerate(answers, 1) if answer is not None), None)
    assert first == stops_after


@pytest.mark.parametrize(
    "damage", [{"state": [1]}, {"state": ["a", 0, 0]}, {"best": {}}, {"best": "low"}]
)
def test_what_a_checkpoint_says_may_be_damaged(damage: dict[str, Any]) -> None:
    rule = EarlyStop(metric="loss", mode="min")
    saved = {**EarlyStopping(rule).state_dict(1, 1), **damage}
    with pytest.raises(StorageError, match="early_stop is damaged"):
        EarlyStopping(rule, saved)


def test_the_reason_names_the_best_step() -> None:
    stopping = EarlyStopping(EarlyStop(metric="loss", mode="min", patience=2))
    told = [stopping.evaluated(step, {"loss": 1.0}) for step in (5, 10, 15)]
    assert told == [None, None, "loss got no better since step 5, in 2 evaluations"]


def test_a_job_whose_evaluations_come_at_its_end_only_cannot_stop_early() -> None:
    more = {"early_stop": {"metric": "loss", "mode": "min"}, "evaluation": {"every_epochs": 0}}
    (problem,) = Job.model_validate({**fields_of("ring", 1), **more}).problems()
    assert "early_stop: needs evaluations during the run" in str(problem)


def test_early_stop_ends_a_run_as_after_its_last_step(tmp_path: Path) -> None:
    """In this process what is decided after a step holds before the next one."""
    rule = {"metric": "score", "mode": "max", "patience": 2}
    given = spec(tmp_path, [1.0, 3.0, 2.0, 2.0], early_stop=rule, checkpoint={})
    result = Trainer(given, Scored).fit()
    assert result.totals.steps == 4 and [one.step for one in result.evaluations] == [1, 2, 3, 4]
    assert result.stopped == "score got no better since step 2, in 2 evaluations"
    assert result.checkpoint is not None and result.checkpoint.exists()
    assert '"stopped": "score got no better' in (result.path / "result.json").read_text()
    assert "stopped early  score got no better" in str(result)


@pytest.mark.parametrize("mode, figures", [("min", [3.0, 2.0, 4.0, 2.5, 5.0, 6.0]), ("max", [1.0])])
def test_patience_goes_on_with_a_resumed_run(mode: Any, figures: list[float]) -> None:
    rule = EarlyStop(metric="loss", mode=mode, patience=4)
    whole, before = EarlyStopping(rule), EarlyStopping(rule)
    figures = [*figures, *[figures[-1]] * 6, math.inf]
    answers = [whole.evaluated(n, {"loss": one}) for n, one in enumerate(figures, 1)]
    for step, figure in enumerate(figures, 1):
        before.evaluated(step, {"loss": figure})
    for kept in range(len(figures)):
        saved = json.loads(json.dumps(before.state_dict(kept, 1)))
        after = EarlyStopping(rule, saved)
        again = [after.evaluated(n, {"loss": one}) for n, one in enumerate(figures, 1)]
        assert again == [None] * kept + answers[kept:]
    other = EarlyStopping(EarlyStop(metric="loss", mode=mode, patience=1), before.state_dict(1, 1))
    assert other.evaluated(2, {"loss": math.nan}) is not None
    anew = EarlyStopping(EarlyStop(metric="acc", mode=mode, patience=2), before.state_dict(4, 1))
    assert anew.evaluated(1, {"acc": math.nan}) is None


def test_an_evaluation_at_the_end_alone_is_not_counted_by_a_longer_run() -> None:
    rule = EarlyStop(metric="loss", mode="min", patience=2)
    stopping = EarlyStopping(rule)
    for step, figure in [(4, 1.0), (8, 2.0), (10, 3.0)]:
        stopping.evaluated(step, {"loss": figure})
    longer = EarlyStopping(rule, stopping.state_dict(10, 4))
    assert longer.evaluated(8, {"loss": 2.0}) is None  # made again
    assert (
        longer.evaluated(12, {"loss": 4.0}) == "loss got no better since step 4, in 2 evaluations"
    )


def test_patience_goes_on_where_evaluations_come_at_other_steps_than_before() -> None:
    rule = EarlyStop(metric="loss", mode="min", patience=2)
    first = EarlyStopping(rule)
    first.evaluated(5, {"loss": 1.0})
    second = EarlyStopping(rule, first.state_dict(5, 5))
    third = EarlyStopping(
        rule, second.state_dict(7, 8)
    )  # of a checkpoint before its first evaluation
    told = [third.evaluated(step, {"loss": 1.0}) for step in (8, 16)]
    assert told == [None, "loss got no better since step 5, in 2 evaluations"]


@pytest.mark.parametrize("kept", [3, 4])
def test_early_stop_of_a_resumed_run_is_that_of_one_that_never_stopped(
    kept: int, tmp_path: Path
) -> None:
    rule = {"metric": "score", "mode": "max", "patience": 4}
    more: dict[str, Any] = {"checkpoint": {"every_steps": 1, "num_to_keep": 9}}
    scores = [1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    given = spec(tmp_path, scores, early_stop=rule, steps=8, **more)
    first = Trainer(given, Scored, callbacks=[AfterItsCheckpoint()]).fit()
    assert first.totals.steps == 6 and first.stopped is not None
    where = first.path / "checkpoints" / f"step-{kept:06d}"
    given["task_args"] = {"scores": scores[kept - 1 :]}  # that after its step is made again
    result = Trainer(given, Scored, resume=where).fit()
    assert result.evaluations[-1].step == 6 and result.stopped == first.stopped


def test_early_stop_that_is_damaged_is_told_before_there_is_a_run(tmp_path: Path) -> None:
    given = spec(tmp_path, [1.0, 2.0], steps=2, checkpoint={"every_steps": 1})
    given["early_stop"] = {"metric": "score", "mode": "max"}
    first = Trainer(given, Scored).fit().path
    [*_, newest] = sorted((first / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    state["early_stop"]["state"] = [1]
    files = {one.name: [one.read_bytes()] for one in newest.glob("*.safetensors")}
    (tmp_path / "other").mkdir()
    other = Catalogue(tmp_path / "other" / "checkpoints").write(2, files, state)
    with pytest.raises(StorageError, match="early_stop is damaged"):
        Trainer({**given, "steps": 3}, Scored, resume=other).fit()
    assert [*first.parent.glob("*/job.yaml")] == [first / "job.yaml"]
