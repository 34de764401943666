"""A run that a callback, `early_stop` or `max_time_s` ends before its last step."""

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


def test_a_run_ends_once_its_time_is_over_and_has_made_a_step() -> None:
    now = [10.0]
    callbacks = Callbacks([], max_time_s=5.0, clock=lambda: now[0])
    now[0] = 20.0
    assert not callbacks.ending(), "it has made no step"
    callbacks.tell(StepSummary(1, 0, 0.5, 4, {}))
    assert callbacks.ending()
    assert callbacks.stop == "max_time_s: 5 s are over"
    in_time = Callbacks([], max_time_s=5.0, clock=lambda: 0.0)
    in_time.tell(StepSummary(1, 0, 0.5, 4, {}))
    assert not in_time.ending()
    assert not Callbacks([]).ending()


def test_a_run_without_time_makes_one_step_and_ends_well(tmp_path: Path) -> None:
    result = Trainer({**FIELDS, "storage_path": str(tmp_path), "max_time_s": 1e-9}, Lin).fit()
    assert [step.step for step in result.history] == [1]
    assert result.stopped == "max_time_s: 1e-09 s are over"
    assert result.checkpoint is not None


OWN = {"name": "own", "strategy": "ring", "scaling": {"num_workers": 0}}


class Enough(Callback):
    """Wants the run to end once so many steps were told."""

    def __init__(self, after: int, reason: bool | str = "enough") -> None:
        self.after, self.reason, self.steps = after, reason, 0

    def on_step(self, step: StepSummary) -> None:
        self.steps += 1

    def should_stop(self) -> bool | str:
        return self.reason if self.steps >= self.after else False


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", "hybrid"])
def test_a_run_that_is_told_to_stop_ends_well(strategy: str, tmp_path: Path) -> None:
    spec = {**FIELDS, "strategy": strategy, "storage_path": str(tmp_path)}
    spec["evaluation"] = {"every_steps": 4}
    result = Trainer(spec, Evaluated, callbacks=[Enough(2)]).fit()
    made = result.totals.steps
    assert made == 2 if strategy != "ps-async" else 2 <= made < 6
    assert (result.stopped, result.history[-1].step) == ("enough", made)
    assert [one.step for one in result.evaluations] == [made], "as after a last step"
    assert result.checkpoint is not None and result.checkpoint.exists()
    facts = json.loads((result.path / "result.json").read_text())
    assert (facts["status"], facts["stopped"]) == ("SUCCEEDED", "enough")


def test_who_stops_a_run_without_a_reason_is_named(tmp_path: Path) -> None:
    spec = {**FIELDS, "storage_path": str(tmp_path)}
    result = Trainer(spec, Lin, callbacks=[Enough(3, True), Enough(3, "later")]).fit()
    assert (result.totals.steps, result.stopped) == (3, "Enough.should_stop()")


def test_a_run_that_makes_all_its_steps_was_not_stopped(tmp_path: Path) -> None:
    spec = {**FIELDS, "storage_path": str(tmp_path)}
    result = Trainer(spec, Lin, callbacks=[Enough(6)]).fit()
    assert (result.totals.steps, result.stopped) == (6, None)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_a_train_function_is_told_when_it_asks(strategy: str, tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        for number in range(6):
            distplat.report({"score": float(number)})
            if distplat.should_stop():
                break

    job = {**OWN, "strategy": strategy, "storage_path": str(tmp_path)}
    result = Trainer(job, train, callbacks=[Enough(3)]).fit()
    assert (len(result.history), result.stopped) == (3, "enough")
    stop = {"early_stop": {"metric": "score", "mode": "min", "patience": 2}}
    result = Trainer({**job, **stop}, train).fit()
    assert (len(result.history), result.metrics["score"]) == (3, 2.0)
    assert result.stopped == "score got no better since step 1, in 2 evaluations"


@pytest.mark.parametrize("kept", [1, 3])
def test_a_resumed_train_function_goes_on_with_early_stop_and_its_own_counters(
    kept: int, tmp_path: Path
) -> None:
    """A checkpoint without a tensor is one, too."""
    scores = [1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0]

    def train(config: dict[str, Any]) -> None:
        first = (distplat.get_checkpoint() or {"made": 0, "best": math.inf})["made"]
        for made, score in enumerate(scores[first:], first + 1):
            distplat.report({"score": score}, checkpoint={"made": made, "best": -math.inf})
            while not [*tmp_path.glob(f"*/checkpoints/*{made}/state.json")]:
                time.sleep(0.01)  # else some would be skipped
            if distplat.should_stop():
                break

    stop = {"early_stop": {"metric": "score", "mode": "max", "patience": 3}}
    job = {**OWN, **stop, "checkpoint": {"num_to_keep": 9}, "storage_path": str(tmp_path)}
    first = Trainer(job, train).fit()
    assert len(first.history) == 5
    again = Trainer(job, train, resume=first.path / f"checkpoints/step-{kept:06d}").fit()
    assert [one.step for one in again.history] == [*range(kept + 1, 6)]
    assert again.stopped == first.stopped == "score got no better since step 2, in 3 evaluations"


def test_a_train_function_is_told_that_its_time_is_over(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        while not distplat.should_stop():
            distplat.report({"loss": 1.0})

    result = Trainer({**OWN, "max_time_s": 0.01, "storage_path": str(tmp_path)}, train).fit()
    assert result.stopped == "max_time_s: 0.01 s are over"


def test_a_train_function_that_never_asks_is_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: dict[str, Any]) -> None:
        for _ in range(3):
            distplat.report({"loss": 1.0})

    Trainer({**OWN, "storage_path": str(tmp_path)}, train, callbacks=[Enough(1)]).fit()
    assert caplog.text.count("never calls distplat.should_stop()") == 1


def test_the_best_checkpoint_of_a_train_function_is_that_of_the_best_report(
    tmp_path: Path,
) -> None:
    def train(config: dict[str, Any]) -> None:
        for number, score in enumerate([1.0, 3.0, 2.0, 2.5, 1.5]):
            distplat.report({"score": score}, checkpoint={"number": number})
            while not [*tmp_path.glob(f"*/checkpoints/*{2 * number + 1}/state.json")]:
                time.sleep(0.01)  # else some would be skipped
            distplat.report({"loss": 1.0})

    keep = {"keep_best": {"metric": "score", "mode": "max"}, "num_to_keep": 1}
    result = Trainer({**OWN, "checkpoint": keep, "storage_path": str(tmp_path)}, train).fit()
    assert result.best_checkpoint is not None
    assert int(result.best_checkpoint.name.rpartition("-")[2]) == 3


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"checkpoint": {"keep_best": {"metric": "acc", "mode": "max"}}}, "no 'acc' to compare"),
        ({"early_stop": {"metric": "acc", "mode": "max"}}, "no report.. had a 'acc'"),
    ],
)
def test_a_train_function_has_to_report_what_its_job_goes_by(
    more: dict[str, Any], text: str, tmp_path: Path
) -> None:
    def train(config: dict[str, Any]) -> None:
        distplat.report({"accuracy": 1.0}, checkpoint={"number": 1})

    with pytest.raises(SpecError, match=text):
        Trainer({**OWN, **more, "storage_path": str(tmp_path)}, train).fit()
