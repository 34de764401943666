"""Runs that a callback, `early_stop` or `max_time_s` ends before the last step."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from line_task import FIELDS, Evaluated, Lin

import distplat
from distplat import Callback, Trainer
from distplat.actors.callbacks import Callbacks
from distplat.platform.errors import SpecError
from distplat.platform.progress import (
    StepSummary,
)


def test_max_time_ends_run_after_at_least_one_step() -> None:
    now = [10.0]
    callbacks = Callbacks([], max_time_s=5.0, clock=lambda: now[0])
    now[0] = 20.0
    assert not callbacks.ending(), "no step was completed"
    callbacks.tell(StepSummary(1, 0, 0.5, 4, {}))
    assert callbacks.ending()
    assert callbacks.stop == "max_time_s: 5 s are over"
    in_time = Callbacks([], max_time_s=5.0, clock=lambda: 0.0)
    in_time.tell(StepSummary(1, 0, 0.5, 4, {}))
    assert not in_time.ending()
    assert not Callbacks([]).ending()


def test_expired_max_time_allows_one_step(tmp_path: Path) -> None:
    result = Trainer({**FIELDS, "storage_path": str(tmp_path), "max_time_s": 1e-9}, Lin).fit()
    assert [step.step for step in result.history] == [1]
    assert result.stopped == "max_time_s: 1e-09 s are over"
    assert result.checkpoint is not None


FUNCTION_FIELDS = {"name": "own", "strategy": "ring", "scaling": {"num_workers": 0}}


class StopAfter(Callback):
    """Stop the run after a number of steps."""

    def __init__(self, after: int, reason: bool | str = "enough") -> None:
        self.after, self.reason, self.steps = after, reason, 0

    def on_step(self, step: StepSummary) -> None:
        self.steps += 1

    def should_stop(self) -> bool | str:
        return self.reason if self.steps >= self.after else False


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", "hybrid"])
def test_callback_stops_run(strategy: str, tmp_path: Path) -> None:
    spec = {**FIELDS, "strategy": strategy, "storage_path": str(tmp_path)}
    spec["evaluation"] = {"every_steps": 4}
    result = Trainer(spec, Evaluated, callbacks=[StopAfter(2)]).fit()
    steps = result.totals.steps
    assert steps == 2 if strategy != "ps-async" else 2 <= steps < 6
    assert (result.stopped, result.history[-1].step) == ("enough", steps)
    assert [summary.step for summary in result.evaluations] == [steps], "a final evaluation"
    assert result.checkpoint is not None and result.checkpoint.exists()
    facts = json.loads((result.path / "result.json").read_text())
    assert (facts["status"], facts["stopped"]) == ("SUCCEEDED", "enough")


def test_stop_without_reason_names_the_callback(tmp_path: Path) -> None:
    spec = {**FIELDS, "storage_path": str(tmp_path)}
    result = Trainer(spec, Lin, callbacks=[StopAfter(3, True), StopAfter(3, "later")]).fit()
    assert (result.totals.steps, result.stopped) == (3, "StopAfter.should_stop()")


def test_run_with_all_steps_is_not_stopped(tmp_path: Path) -> None:
    spec = {**FIELDS, "storage_path": str(tmp_path)}
    result = Trainer(spec, Lin, callbacks=[StopAfter(6)]).fit()
    assert (result.totals.steps, result.stopped) == (6, None)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_should_stop_in_train_function(strategy: str, tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        for number in range(6):
            distplat.report({"score": float(number)})
            if distplat.should_stop():
                break

    job = {**FUNCTION_FIELDS, "strategy": strategy, "storage_path": str(tmp_path)}
    result = Trainer(job, train, callbacks=[StopAfter(3)]).fit()
    assert (len(result.history), result.stopped) == (3, "enough")
    stop = {"early_stop": {"metric": "score", "mode": "min", "patience": 2}}
    result = Trainer({**job, **stop}, train).fit()
    assert (len(result.history), result.metrics["score"]) == (3, 2.0)
    assert result.stopped == "score got no better since step 1, in 2 evaluations"


@pytest.mark.parametrize("saved_step", [1, 3])
def test_resumed_train_function_continues_early_stop(saved_step: int, tmp_path: Path) -> None:
    """The checkpoint has no tensors."""
    scores = [1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0]

    def train(config: dict[str, Any]) -> None:
        first = (distplat.get_checkpoint() or {"step": 0, "best": math.inf})["step"]
        for step, score in enumerate(scores[first:], first + 1):
            distplat.report({"score": score}, checkpoint={"step": step, "best": -math.inf})
            while not [*tmp_path.glob(f"*/checkpoints/*{step}/state.json")]:
                time.sleep(0.01)  # otherwise checkpoints may be skipped
            if distplat.should_stop():
                break

    stop = {"early_stop": {"metric": "score", "mode": "max", "patience": 3}}
    job = {
        **FUNCTION_FIELDS,
        **stop,
        "checkpoint": {"num_to_keep": 9},
        "storage_path": str(tmp_path),
    }
    first = Trainer(job, train).fit()
    assert len(first.history) == 5
    resumed = Trainer(job, train, resume=first.path / f"checkpoints/step-{saved_step:06d}").fit()
    assert [summary.step for summary in resumed.history] == [*range(saved_step + 1, 6)]
    assert resumed.stopped == first.stopped == "score got no better since step 2, in 3 evaluations"


def test_max_time_stops_train_function(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        while not distplat.should_stop():
            distplat.report({"loss": 1.0})

    result = Trainer(
        {**FUNCTION_FIELDS, "max_time_s": 0.01, "storage_path": str(tmp_path)}, train
    ).fit()
    assert result.stopped == "max_time_s: 0.01 s are over"


def test_warns_if_train_function_never_calls_should_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: dict[str, Any]) -> None:
        for _ in range(3):
            distplat.report({"loss": 1.0})

    Trainer(
        {**FUNCTION_FIELDS, "storage_path": str(tmp_path)}, train, callbacks=[StopAfter(1)]
    ).fit()
    assert caplog.text.count("never calls distplat.should_stop()") == 1


def test_best_checkpoint_of_train_function_is_of_best_report(
    tmp_path: Path,
) -> None:
    def train(config: dict[str, Any]) -> None:
        for number, score in enumerate([1.0, 3.0, 2.0, 2.5, 1.5]):
            distplat.report({"score": score}, checkpoint={"number": number})
            while not [*tmp_path.glob(f"*/checkpoints/*{2 * number + 1}/state.json")]:
                time.sleep(0.01)  # otherwise checkpoints may be skipped
            distplat.report({"loss": 1.0})

    keep = {"keep_best": {"metric": "score", "mode": "max"}, "num_to_keep": 1}
    result = Trainer(
        {**FUNCTION_FIELDS, "checkpoint": keep, "storage_path": str(tmp_path)}, train
    ).fit()
    assert result.best_checkpoint is not None
    assert int(result.best_checkpoint.name.rpartition("-")[2]) == 3


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"checkpoint": {"keep_best": {"metric": "acc", "mode": "max"}}}, "no 'acc' to compare"),
        ({"early_stop": {"metric": "acc", "mode": "max"}}, "no report.. had a 'acc'"),
    ],
)
def test_train_function_must_report_the_jobs_metric(
    fields: dict[str, Any], text: str, tmp_path: Path
) -> None:
    def train(config: dict[str, Any]) -> None:
        distplat.report({"accuracy": 1.0}, checkpoint={"number": 1})

    with pytest.raises(SpecError, match=text):
        Trainer({**FUNCTION_FIELDS, **fields, "storage_path": str(tmp_path)}, train).fit()
