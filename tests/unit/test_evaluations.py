"""Evaluations select the best checkpoint and may stop the run early."""

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
LIMIT_S = 60.0


@pytest.mark.parametrize(
    "mode, value, best, min_delta, is_better",
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
def test_is_better(
    mode: Any, value: float, best: float | None, min_delta: float, is_better: bool
) -> None:
    assert MetricRule(metric="loss", mode=mode).is_better(value, best, min_delta) is is_better


def best_of(*events: tuple[str, int] | tuple[str, int, float]) -> BestCheckpoint:
    best = BestCheckpoint(KeepBest(metric="loss", mode="min"))
    for event, step, *loss in events:
        if event == "saved":
            best.saved(step)
        else:
            best.evaluated(step, {"loss": loss[0]})
    return best


@pytest.mark.parametrize(
    "events, best_step, protected",
    [
        ([], None, set()),
        ([("saved", 2)], None, {2}),
        ([("evaluated", 2, 0.5)], None, set()),
        ([("saved", 2), ("evaluated", 2, 0.5)], 2, {2}),
        ([("evaluated", 2, 0.5), ("saved", 2)], 2, {2}),
        ([("saved", 2), ("evaluated", 2, 0.5), ("saved", 4)], 2, {2, 4}),
        ([("saved", 2), ("saved", 4), ("evaluated", 2, 0.5), ("evaluated", 4, 0.25)], 4, {4}),
        ([("saved", 2), ("saved", 4), ("evaluated", 2, 0.5), ("evaluated", 4, 0.75)], 2, {2}),
        # The first of equals; never NaN; a checkpoint without an evaluation is not protected.
        ([("saved", 2), ("evaluated", 2, 0.5), ("saved", 4), ("evaluated", 4, 0.5)], 2, {2}),
        ([("saved", 2), ("evaluated", 2, NAN)], None, set()),
        ([("saved", 2), ("evaluated", 3, 0.5)], None, set()),
        # Evaluations arrive in any order under leases.
        ([("saved", 2), ("saved", 4), ("evaluated", 4, 0.5), ("evaluated", 2, 0.25)], 2, {2}),
    ],
)
def test_best_checkpoint(events: Any, best_step: int | None, protected: set[int]) -> None:
    best = best_of(*events)
    assert (best.step, best.protected) == (best_step, protected)


def test_rollback_forgets_deleted_checkpoints() -> None:
    best = best_of(("saved", 2), ("evaluated", 2, 0.5), ("saved", 4), ("evaluated", 4, 0.25))
    best.retain([2])
    assert (best.step, best.figure) == (2, 0.5)
    best.saved(4)  # written again, without a second evaluation
    assert (best.step, best.figure) == (4, 0.25)


def test_number_of_remembered_evaluations_is_bounded() -> None:
    best = best_of(("saved", 1), ("evaluated", 1, 0.0))
    for step in range(2, 3000):
        best.evaluated(step, {"loss": 1.0})
    assert best.step == 1 and len(best._figures) == 1000


def test_without_a_rule_nothing_is_protected() -> None:
    best = BestCheckpoint(None)
    best.saved(2)
    best.evaluated(2, {"loss": 0.5})
    assert (best.step, best.protected) == (None, set())


def test_protected_steps_are_not_deletable() -> None:
    assert deletable_steps([2, 4, 6, 8], 2, 8) == [2, 4]
    assert deletable_steps([2, 4, 6, 8], 2, 8, {2}) == [4]


BEST = {"metric": "score", "mode": "max"}


@pytest.mark.parametrize(
    "checkpoint, evaluation, message",
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
def test_keep_best_needs_an_evaluation_of_each_checkpoint(
    checkpoint: dict[str, int], evaluation: dict[str, int], message: str
) -> None:
    fields = {"checkpoint": {**checkpoint, "keep_best": BEST}, "evaluation": evaluation}
    job = Job.model_validate({**fields_of("ring", 1), **fields})
    assert message in "; ".join(map(str, job.problems()))
    assert bool(message) is bool(job.problems())


class Scored(Task):
    """A task whose evaluations return the given scores in order."""

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


class WaitForCheckpoint(Callback):
    """Blocks the run at each evaluation until the checkpoint of that step is on the disk."""

    def on_start(self, job: Job, run: str, path: Path) -> None:
        self.folder, self.last = path / "checkpoints", job.steps

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        if evaluation.step == self.last:
            return  # the run writes this checkpoint after the evaluation, and waits for it
        pause, deadline = threading.Event(), time.monotonic() + LIMIT_S
        while not (self.folder / f"step-{evaluation.step:06d}").is_dir():
            assert time.monotonic() < deadline, "the checkpoint was not written"
            pause.wait(0.01)


def spec(tmp_path: Path, scores: list[float], **more: Any) -> dict[str, Any]:
    fields = fields_of("ring", 0, epochs=None, steps=6, global_batch_size=4)
    checkpoint = {"every_steps": 1, "num_to_keep": 1, "keep_best": BEST}
    evaluation = {"every_steps": 1}
    args = {"scores": scores}
    rules = {"checkpoint": checkpoint, "evaluation": evaluation, "task_args": args}
    return {**fields, **rules, "storage_path": str(tmp_path), **more}


@pytest.mark.parametrize(
    "scores, best, remaining",
    [
        ([1, 3, 2, 2, 1, 0], 2, [2, 6]),
        ([1, 3, 2, 2, 1, 4], 6, [6]),
        ([5, 3, 2, 2, 1, 4], 1, [1, 6]),
    ],
)
def test_best_checkpoint_is_kept(
    scores: list[float],
    best: int,
    remaining: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    result = Trainer(spec(tmp_path, scores), Scored, callbacks=[WaitForCheckpoint()]).fit()
    catalogue = Catalogue(result.path / "checkpoints")
    assert "continues without it" not in caplog.text
    assert result.best_checkpoint == catalogue.path(best)
    assert catalogue.steps() == remaining
    assert (
        f'"best_checkpoint": "{catalogue.path(best)}"' in (result.path / "result.json").read_text()
    )
    assert f"best checkpoint  {catalogue.path(best)}" in str(result)


def test_keep_best_with_an_unknown_metric(tmp_path: Path) -> None:
    job = spec(tmp_path, [1.0] * 6)
    job["checkpoint"] = {"every_steps": 1, "keep_best": {"metric": "scor", "mode": "max"}}
    counter = StepCounter()
    with pytest.raises(SpecError, match=r"no 'scor'.*\n?.*did you mean 'score'\?.*loss, score"):
        Trainer(job, Scored, callbacks=[counter]).fit()
    assert counter.steps == 1


class StepCounter(Callback):
    steps = 0

    def on_end(self, result: Result, error: BaseException | None) -> None:
        self.steps = result.totals.steps


def test_keep_best_needs_eval_data(tmp_path: Path) -> None:
    args, counter = {"scores": [], "evaluates": False}, StepCounter()
    with pytest.raises(SpecError, match=r"keep_best.*eval_data\(\) gives no data"):
        Trainer(spec(tmp_path, [], task_args=args), Scored, callbacks=[counter]).fit()
    assert counter.steps == 0


def test_evaluation_epochs_are_compared_with_checkpoint_steps(tmp_path: Path) -> None:
    job = spec(tmp_path, [1.0] * 6, evaluation={"every_epochs": 1})  # an epoch has two steps
    with pytest.raises(SpecError, match="every 1, and evaluated every 2"):
        Trainer(job, Scored).fit()


@pytest.mark.parametrize(
    "rule, values, stops_after",
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
def test_early_stopping(rule: dict[str, Any], values: list[float], stops_after: int | None) -> None:
    stopping = EarlyStopping(EarlyStop(metric="loss", **rule))
    answers = [stopping.evaluated(n, {"loss": value}) for n, value in enumerate(values, 1)]
    first = next((n for n, answer in enumerate(answers, 1) if answer is not None), None)
    assert first == stops_after


@pytest.mark.parametrize(
    "damage", [{"state": [1]}, {"state": ["a", 0, 0]}, {"best": {}}, {"best": "low"}]
)
def test_damaged_early_stop_state(damage: dict[str, Any]) -> None:
    rule = EarlyStop(metric="loss", mode="min")
    saved = {**EarlyStopping(rule).state_dict(1, 1), **damage}
    with pytest.raises(StorageError, match="early_stop is damaged"):
        EarlyStopping(rule, saved)


def test_early_stop_reason_names_the_best_step() -> None:
    stopping = EarlyStopping(EarlyStop(metric="loss", mode="min", patience=2))
    answers = [stopping.evaluated(step, {"loss": 1.0}) for step in (5, 10, 15)]
    assert answers == [None, None, "loss got no better since step 5, in 2 evaluations"]


def test_early_stop_needs_evaluations_during_the_run() -> None:
    fields = {"early_stop": {"metric": "loss", "mode": "min"}, "evaluation": {"every_epochs": 0}}
    (problem,) = Job.model_validate({**fields_of("ring", 1), **fields}).problems()
    assert "early_stop: needs evaluations during the run" in str(problem)


def test_early_stop_completes_the_run(tmp_path: Path) -> None:
    """In this process a decision after a step takes effect before the next one."""
    rule = {"metric": "score", "mode": "max", "patience": 2}
    job = spec(tmp_path, [1.0, 3.0, 2.0, 2.0], early_stop=rule, checkpoint={})
    result = Trainer(job, Scored).fit()
    assert result.totals.steps == 4 and [e.step for e in result.evaluations] == [1, 2, 3, 4]
    assert result.stopped == "score got no better since step 2, in 2 evaluations"
    assert result.checkpoint is not None and result.checkpoint.exists()
    assert '"stopped": "score got no better' in (result.path / "result.json").read_text()
    assert "stopped early  score got no better" in str(result)


@pytest.mark.parametrize("mode, losses", [("min", [3.0, 2.0, 4.0, 2.5, 5.0, 6.0]), ("max", [1.0])])
def test_resumed_run_continues_the_patience(mode: Any, losses: list[float]) -> None:
    rule = EarlyStop(metric="loss", mode=mode, patience=4)
    whole, first = EarlyStopping(rule), EarlyStopping(rule)
    losses = [*losses, *[losses[-1]] * 6, math.inf]
    answers = [whole.evaluated(n, {"loss": loss}) for n, loss in enumerate(losses, 1)]
    for step, loss in enumerate(losses, 1):
        first.evaluated(step, {"loss": loss})
    for saved_step in range(len(losses)):
        saved = json.loads(json.dumps(first.state_dict(saved_step, 1)))
        resumed = EarlyStopping(rule, saved)
        resumed_answers = [resumed.evaluated(n, {"loss": loss}) for n, loss in enumerate(losses, 1)]
        assert resumed_answers == [None] * saved_step + answers[saved_step:]
    shorter = EarlyStopping(EarlyStop(metric="loss", mode=mode, patience=1), first.state_dict(1, 1))
    assert shorter.evaluated(2, {"loss": math.nan}) is not None
    other = EarlyStopping(EarlyStop(metric="acc", mode=mode, patience=2), first.state_dict(4, 1))
    assert other.evaluated(1, {"acc": math.nan}) is None


def test_longer_run_does_not_count_the_final_evaluation() -> None:
    rule = EarlyStop(metric="loss", mode="min", patience=2)
    stopping = EarlyStopping(rule)
    for step, loss in [(4, 1.0), (8, 2.0), (10, 3.0)]:
        stopping.evaluated(step, {"loss": loss})
    longer = EarlyStopping(rule, stopping.state_dict(10, 4))
    assert longer.evaluated(8, {"loss": 2.0}) is None  # repeated
    assert (
        longer.evaluated(12, {"loss": 4.0}) == "loss got no better since step 4, in 2 evaluations"
    )


def test_patience_continues_with_another_evaluation_interval() -> None:
    rule = EarlyStop(metric="loss", mode="min", patience=2)
    first = EarlyStopping(rule)
    first.evaluated(5, {"loss": 1.0})
    second = EarlyStopping(rule, first.state_dict(5, 5))
    # From a checkpoint before the second run's first evaluation.
    third = EarlyStopping(rule, second.state_dict(7, 8))
    answers = [third.evaluated(step, {"loss": 1.0}) for step in (8, 16)]
    assert answers == [None, "loss got no better since step 5, in 2 evaluations"]


@pytest.mark.parametrize("saved_step", [3, 4])
def test_resumed_run_stops_at_the_same_step(saved_step: int, tmp_path: Path) -> None:
    rule = {"metric": "score", "mode": "max", "patience": 4}
    more: dict[str, Any] = {"checkpoint": {"every_steps": 1, "num_to_keep": 9}}
    scores = [1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    job = spec(tmp_path, scores, early_stop=rule, steps=8, **more)
    first = Trainer(job, Scored, callbacks=[WaitForCheckpoint()]).fit()
    assert first.totals.steps == 6 and first.stopped is not None
    checkpoint = first.path / "checkpoints" / f"step-{saved_step:06d}"
    # The evaluation of the saved step is repeated.
    job["task_args"] = {"scores": scores[saved_step - 1 :]}
    result = Trainer(job, Scored, resume=checkpoint).fit()
    assert result.evaluations[-1].step == 6 and result.stopped == first.stopped


def test_damaged_early_stop_state_fails_before_the_run(tmp_path: Path) -> None:
    job = spec(tmp_path, [1.0, 2.0], steps=2, checkpoint={"every_steps": 1})
    job["early_stop"] = {"metric": "score", "mode": "max"}
    first = Trainer(job, Scored).fit().path
    [*_, newest] = sorted((first / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    state["early_stop"]["state"] = [1]
    files = {file.name: [file.read_bytes()] for file in newest.glob("*.safetensors")}
    (tmp_path / "other").mkdir()
    other = Catalogue(tmp_path / "other" / "checkpoints").write(2, files, state)
    with pytest.raises(StorageError, match="early_stop is damaged"):
        Trainer({**job, "steps": 3}, Scored, resume=other).fit()
    assert [*first.parent.glob("*/job.yaml")] == [first / "job.yaml"]
