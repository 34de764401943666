"""Output of a run: progress lines, the progress bar of a terminal, and the result table."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import job_of

from distplat.actors import view as view_module
from distplat.actors.result import Result
from distplat.actors.view import View, view_here
from distplat.cli.render import facts_of, print_result
from distplat.platform.progress import (
    EvalSummary,
    FailureEvent,
    Recovery,
    Resized,
    StepSummary,
    to_json,
)

JOB = job_of("ring", 2, name="lin", task="lin:Lin", steps=100, global_batch_size=16)


def step(number: int, loss: float = 0.5, seconds: float = 0.25) -> StepSummary:
    parts = {"data": 0.0, "compute": seconds, "exchange": seconds, "update": 0.0}
    return StepSummary(number + 1, number // 10, loss, 16, parts, of=100)


class Clock:
    """Replaces `time` in the module under test."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(view_module, "time", clock)
    return clock


def progress_lines(clock: Clock, seconds_per_step: float, steps: int, **options: Any) -> list[str]:
    out = io.StringIO()
    view = View(out, **options)
    view.on_start(JOB, "lin-1", Path("/runs/lin-1"))
    for number in range(steps):
        clock.now += seconds_per_step
        view.on_step(step(number))
    return out.getvalue().splitlines()


def test_prints_a_line_at_most_every_two_seconds(clock: Clock) -> None:
    lines = progress_lines(clock, 0.5, steps=13)
    assert lines[0] == "run lin-1: ring, 2 workers, starting"
    assert [line.split()[1] for line in lines[1:]] == ["1/100", "5/100", "9/100", "13/100"]


def test_run_of_unknown_length_has_no_total_and_no_eta(clock: Clock) -> None:
    out = io.StringIO()
    view = View(out)
    view.on_start(JOB, "lin-1", Path("/runs/lin-1"))
    for number in range(3):
        clock.now += 2.0
        view.on_step(replace(step(number), of=0))
    assert out.getvalue().splitlines()[-1] == "step 3  epoch 1  loss 0.5  32 samples/s"


def test_line_has_speed_and_eta(clock: Clock) -> None:
    lines = progress_lines(clock, 2.0, steps=41)
    assert lines[1] == "step 1/100  epoch 1  loss 0.5  32 samples/s"
    assert lines[-1] == "step 41/100  epoch 5  loss 0.5  32 samples/s  eta 1:58"


def test_prints_the_last_step(clock: Clock) -> None:
    assert progress_lines(clock, 0.001, steps=100)[-1].startswith(
        "step 100/100  epoch 10  loss 0.5"
    )


def test_prints_every_evaluation(clock: Clock) -> None:
    out = io.StringIO()
    view = View(out)
    for number in (1, 2, 3):
        view.on_evaluation(EvalSummary(number, 8, {"loss": 0.25, "accuracy": 0.96875}))
    assert out.getvalue().splitlines() == [
        f"evaluation after step {number}  loss 0.25  accuracy 0.9688" for number in (1, 2, 3)
    ]


def test_prints_failures_recoveries_and_resizes() -> None:
    out = io.StringIO()
    view = View(out)
    view.on_failure(
        FailureEvent(1, 10, "server-0 was lost: killed\nmore", ("worker-0", "worker-1"), 0.0)
    )
    view.on_recovery(Recovery(1, 3.25))
    view.on_resize(Resized(2, 120, 2, 4, 0.28))
    view.on_resize(Resized(3, 121, 4, 1, 0.11))
    assert out.getvalue().splitlines() == [
        "failure: server-0 was lost: killed",
        "attempt 1: replacing worker-0, worker-1, going on after step 10",
        "attempt 1: all workers are at work after 3.2 s",
        "attempt 2: 4 workers from step 120 on, stood still 0.3 s",
        "attempt 3: 1 worker from step 121 on, stood still 0.1 s",
    ]


def test_quiet_prints_nothing(clock: Clock) -> None:
    assert progress_lines(clock, 5.0, steps=3, quiet=True) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_has_a_progress_bar_and_keeps_evaluations(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    view = View(out)
    view.on_start(JOB, "lin-[1]", Path("/runs/lin-1"))
    view.on_step(step(0))
    view.on_evaluation(EvalSummary(1, 8, {"loss": 0.25}))
    view.on_end(Result(Path("/runs/lin-1"), None), None)
    output = out.getvalue()
    assert "run lin-[1]: ring, 2 workers, starting\n" in output.replace("\r", "")
    assert "evaluation after step 1  loss 0.25" in output
    assert "step 1/100" in output
    assert "\x1b[3" not in output  # no color


def result(loss: float = 0.5) -> Result:
    model = Path("/runs/lin-1/model.safetensors")
    result = Result(path=Path("/runs/lin-1"), checkpoint=model, seconds=4.0)
    metrics = {"loss": 0.25, "accuracy": 0.75}
    for summary in (step(0), step(1, loss), EvalSummary(2, 8, metrics)):
        result.add(summary)
    return result


def test_facts_of() -> None:
    assert facts_of(JOB, result()) == {
        "status": "SUCCEEDED",
        "name": "lin",
        "strategy": "ring",
        "num_workers": 2,
        "steps": 2,
        "seconds": 4.0,
        "metrics": {"loss": 0.5, "eval_loss": 0.25, "eval_accuracy": 0.75},
        "samples_per_s": 32.0,
        "time_split": {"data": 0.0, "compute": 0.5, "exchange": 0.5, "update": 0.0},
        "figures": {},
        "checkpoints": [],
        "restarts": [],
        "resizes": [],
        "run_directory": "/runs/lin-1",
        "stopped": None,
        "best_checkpoint": None,
        "url": None,
        "model": "/runs/lin-1/model.safetensors",
    }


def test_result_table_is_aligned_text_without_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(facts_of(JOB, result()))
    assert capsys.readouterr().out.splitlines() == [
        "strategy       ring",
        "workers        2",
        "steps          2",
        "final loss     0.5",
        "evaluation     loss 0.25  accuracy 0.75",
        "speed          32 samples/s",
        "time           data 0%, compute 50%, exchange 50%, update 0%",
        "took           4.0 s",
        "run directory  /runs/lin-1",
        "model          /runs/lin-1/model.safetensors",
    ]


def test_nan_loss_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(to_json(facts_of(JOB, result(float("nan")))))
    assert facts["metrics"]["loss"] is None
    print_result(facts)
    assert "final loss     not a number\n" in capsys.readouterr().out


def test_result_table_without_steps_or_model(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(facts_of(JOB, Result(Path("/runs/lin-1"), None)))
    output = capsys.readouterr().out
    assert "steps          0 reported\n" in output
    assert "model" not in output


def test_view_here_needs_a_terminal_or_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log file gets no progress."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert view_here() is None
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    notebook = view_here()
    assert notebook is not None
    notebook.on_evaluation(EvalSummary(1, 8, {"loss": 0.25}))
    assert out.getvalue() == "evaluation after step 1  loss 0.25\n"
    monkeypatch.delitem(sys.modules, "ipykernel")
    monkeypatch.setattr("sys.stderr", Terminal())
    assert view_here() is not None
    closed = io.StringIO()
    closed.close()
    for stderr in (None, closed):  # None: the process was started with `2>&-`
        monkeypatch.setattr("sys.stderr", stderr)
        assert view_here() is None
        View().on_evaluation(EvalSummary(1, 8, {"loss": 0.25}))
