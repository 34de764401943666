"""Callbacks, a closed output pipe or a full disk do not stop a run."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_task import FIELDS, Evaluated, Lin
from safetensors.numpy import load_file, save
from torch import Tensor

from distplat import Callback, Job, Result, Trainer
from distplat.actors.callbacks import Callbacks
from distplat.actors.controller_client import RunHandlers
from distplat.actors.view import View
from distplat.platform.disk import BackgroundWriter
from distplat.platform.errors import Interrupted, SpecError, StorageError, UserCodeError
from distplat.platform.progress import (
    EvalSummary,
    FailureEvent,
    Recovery,
    Resized,
    Saved,
    StepSummary,
)
from distplat.platform.run_directory import RunDirectory

TASK = """
import time
import torch
from torch import nn
from torch.utils.data import TensorDataset
from distplat import Task

class Lin(Task):
    def model(self):
        return nn.Linear(4, 1)
    def train_data(self):
        return TensorDataset(torch.ones(64, 4), torch.ones(64, 1))
    def loss(self, outputs, targets):
        time.sleep(0.02)
        return nn.functional.mse_loss(outputs, targets)
"""


class BlocksUntilSignal(Callback):
    """Blocks in `on_start`, and receives SIGINT."""

    def on_start(self, job: Job, run: str, path: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(10)


def test_signal_in_on_start_writes_a_result(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        Trainer(FIELDS, Lin, storage_dir=tmp_path, callbacks=(BlocksUntilSignal(),)).fit()
    assert time.monotonic() - started < 10
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["status"] == "STOPPED"


def test_signal_while_saving_the_model_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RunDirectory.save_model

    def save_model(directory: RunDirectory, *args: Any) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return write(directory, *args)

    monkeypatch.setattr(RunDirectory, "save_model", save_model)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        Trainer(FIELDS, Lin, storage_dir=tmp_path).fit()
    (result,) = tmp_path.rglob("result.json")
    facts = json.loads(result.read_text())
    assert facts["status"] == "STOPPED" and Path(facts["model"]).exists()


class Recorder(Callback):
    """Records its events; may raise at one of them."""

    def __init__(self, raises_at: str = "", error: BaseException | None = None) -> None:
        self.raises_at, self.error = raises_at, error
        self.events: list[str] = []

    def _record(self, event: str) -> None:
        self.events.append(event)
        if event == self.raises_at and self.error is not None:
            raise self.error

    def on_start(self, job: Job, run: str, path: Path) -> None:
        self._record("start")

    def on_step(self, step: StepSummary) -> None:
        self._record(f"step {step.step}")

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        self._record(f"evaluation {evaluation.step}")

    def on_checkpoint(self, checkpoint: Saved) -> None:
        self._record(f"checkpoint {checkpoint.step}")

    def on_failure(self, failure: FailureEvent) -> None:
        self._record("failure")

    def on_recovery(self, recovery: Recovery) -> None:
        self._record("recovery")

    def on_resize(self, resized: Resized) -> None:
        self._record("resize")

    def on_end(self, result: Result, error: BaseException | None) -> None:
        outcome = "well" if error is None else type(error).__name__
        self._record(f"end {outcome} with {result.totals.steps} steps")


STEPS = [f"step {number}" for number in range(1, 7)]
CLOSED = OSError("the terminal is closed")


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("start", CLOSED),
        ("start", asyncio.CancelledError()),
        ("step 1", CLOSED),
        ("step 1", SystemExit(0)),
        ("end well with 6 steps", CLOSED),
        ("end well with 6 steps", SystemExit(0)),
    ],
)
def test_callback_that_raises_is_removed(
    event: str, error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Recorder(event, error), Recorder()
    spec = {**FIELDS, "storage_path": str(tmp_path)}
    with caplog.at_level(logging.WARNING):
        result = Trainer(spec, Lin, callbacks=(bad, good)).fit()
    assert bad.events[-1] == event
    assert good.events == ["start", *STEPS, "end well with 6 steps"]
    assert caplog.text.count("continues without it") == 1
    assert json.loads((result.path / "result.json").read_text())["status"] == "SUCCEEDED"


def test_removes_by_identity_not_equality() -> None:
    """Callbacks that are dataclasses may be equal."""

    class Equal(Callback):
        __hash__ = None  # type: ignore[assignment]

        def __init__(self, error: Exception | None) -> None:
            self.error, self.steps = error, list[int]()

        def __eq__(self, other: object) -> bool:
            return True

        def on_step(self, step: StepSummary) -> None:
            self.steps.append(step.step)
            if self.error is not None:
                raise self.error

    good, bad = Equal(None), Equal(CLOSED)
    callbacks = Callbacks([good, bad])
    for step in (1, 2):
        callbacks.tell(StepSummary(step, 0, 0.5, 4, {}))
    assert (good.steps, bad.steps) == ([1, 2], [1])


def test_keyboard_interrupt_in_a_callback_ends_the_run(tmp_path: Path) -> None:
    bad, good = Recorder("start", KeyboardInterrupt()), Recorder()
    with pytest.raises(KeyboardInterrupt):
        Trainer({**FIELDS, "storage_path": str(tmp_path)}, Lin, callbacks=(bad, good)).fit()
    assert good.events == ["end KeyboardInterrupt with 0 steps"]
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["status"] == "STOPPED"


def test_warns_once_of_a_callback_that_does_not_return(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("distplat.actors.callbacks._LOOK_S", 0.005)
    now, looks = [0.0], threading.Semaphore(0)

    def clock() -> float:
        if threading.current_thread().name == "callbacks":
            looks.release()
        return now[0]

    def wait_for_looks() -> None:
        """Wait for three looks: the warning of the first one is logged before the second."""
        while looks.acquire(blocking=False):
            pass
        assert all(looks.acquire(timeout=30) for _ in range(3))

    class Hangs(Callback):
        def on_step(self, step: StepSummary) -> None:
            wait_for_looks()

        def on_evaluation(self, evaluation: EvalSummary) -> None:
            now[0] += 130.0
            wait_for_looks()

    callbacks = Callbacks([Hangs(), Recorder()], clock=clock)
    callbacks.start(Trainer(FIELDS, Lin).job, "run", Path())
    callbacks.tell(StepSummary(1, 0, 0.5, 4, {}))
    assert not caplog.text, "a callback that returns causes no warning"
    callbacks.tell(EvalSummary(1, 8, {}))
    callbacks.tell(EvalSummary(2, 8, {}))
    callbacks.end(Result(Path(), None), None)
    assert caplog.text.count("the callback Hangs has not returned for 120 s") == 1


class RaisesInLoss(Lin):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("no such thing")


def test_reports_evaluations_checkpoints_and_the_end(tmp_path: Path) -> None:
    recorder = Recorder()
    spec = {**FIELDS, "storage_path": str(tmp_path), "evaluation": {"every_steps": 3}}
    Trainer({**spec, "checkpoint": {"every_steps": 6}}, Evaluated, callbacks=[recorder]).fit()
    last = ["evaluation 6", "checkpoint 6", "end well with 6 steps"]
    assert recorder.events == ["start", *STEPS[:3], "evaluation 3", *STEPS[3:], *last]
    recorder = Recorder()
    with pytest.raises(UserCodeError):
        Trainer(spec, RaisesInLoss, callbacks=[recorder]).fit()
    assert recorder.events == ["start", "end UserCodeError with 0 steps"]


def test_reports_failure_recovery_and_resize() -> None:
    recorder = Recorder()
    callbacks = Callbacks([recorder])
    callbacks.tell(FailureEvent(1, 0, "lost", ("worker-0",), 0.0))
    callbacks.tell(Recovery(1, 0.5))
    callbacks.tell(Resized(1, 2, 2, 3, 0.5))
    assert recorder.events == ["failure", "recovery", "resize"]


class UnknownMethod(Callback):
    def on_train_step(self) -> None:
        """Not a method of `Callback`."""


@pytest.mark.parametrize(
    "callback, message",
    [
        (UnknownMethod(), r"callbacks\.1: UnknownMethod\.on_train_step would never be called"),
        (Recorder, r"callbacks\.1: type is no distplat\.Callback"),
    ],
)
def test_rejects_invalid_callbacks(callback: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Trainer(FIELDS, Lin, callbacks=[Recorder(), callback])


def test_full_disk_loses_metrics_but_no_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: RunDirectory, summary: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDirectory, "record", full)
    with caplog.at_level(logging.WARNING):
        result = Trainer({**FIELDS, "storage_path": str(tmp_path)}, Lin).fit()
    assert result.checkpoint is not None and result.checkpoint.exists()
    assert caplog.text.count("No space left on device") == 1
    assert "6 records of metrics were not written" in caplog.text


def test_tensorboard_failure_loses_no_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For example with an incompatible version of protobuf."""

    def broken(path: Path) -> None:
        raise ImportError("protobuf is too old")

    monkeypatch.setattr("distplat.platform.run_directory._TensorBoard", broken)
    with caplog.at_level(logging.WARNING):
        result = Trainer({**FIELDS, "storage_path": str(tmp_path)}, Lin).fit()
    assert len((result.path / "metrics.jsonl").read_text().splitlines()) == 6
    assert caplog.text.count("TensorBoard's curves are lost") == 1
    assert "metrics are lost" not in caplog.text and "records of metrics" not in caplog.text


def test_failure_after_training_keeps_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For example if an embedding server dies while its tables are saved."""

    def train(launch: object, handlers: RunHandlers, stopping: object) -> None:
        handlers.on_model(save({"weight": np.ones(3, np.float32)}))
        raise StorageError("embeddings.0-users.0.0000.safetensors: No space left on device")

    monkeypatch.setattr("distplat.actors.trainer.train_on_ray", train)
    spec = {**FIELDS, "scaling": {"num_workers": 1}, "storage_path": str(tmp_path)}
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match="No space left"):
        Trainer(spec, Lin).fit()
    (model,) = tmp_path.rglob("model.safetensors")
    assert load_file(model)["weight"].tolist() == [1.0, 1.0, 1.0]
    facts = json.loads((model.parent / "result.json").read_text())
    assert (facts["status"], facts["model"]) == ("FAILED", str(model))
    assert f"the trained model was saved to {model}" in caplog.text


def test_failed_write_of_the_result_logs_the_path_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: RunDirectory, status: str, facts: object) -> None:
        raise StorageError("cannot write result.json: No space left on device")

    monkeypatch.setattr(RunDirectory, "finish", full)
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match=r"result\.json"):
        Trainer({**FIELDS, "storage_path": str(tmp_path)}, Lin).fit()
    (model,) = tmp_path.rglob("model.safetensors")
    assert f"the trained model was saved to {model}" in caplog.text


def test_hanging_disk_does_not_block_put() -> None:
    warnings: list[str] = []
    writing, release = threading.Event(), threading.Event()

    def write(record: int) -> None:
        writing.set()
        assert release.wait(30)

    writer = BackgroundWriter(write, warnings.append, most=2)
    writer.put(0)
    assert writing.wait(30)
    for record in range(1, 6):
        writer.put(record)
    assert len(warnings) == 1 and "the disk does not answer" in warnings[0]
    writer.close(0.05)
    assert warnings[1] == "6 records of metrics were not written"
    release.set()
    writer.put(6)
    writer._thread.join(30)
    assert not writer._thread.is_alive() and writer.close(0.0)
    assert len(warnings) == 2


def test_burst_of_records_is_written_completely() -> None:
    """Thousands of steps are reported at once after a slow callback."""
    written: list[int] = []
    writer = BackgroundWriter(written.append, pytest.fail, most=2, patience_s=60.0)
    for record in range(5000):
        writer.put(record)
    assert writer.close(60.0)
    assert written == list(range(5000))


def test_patience_is_shared_by_all_records() -> None:
    """It is renewed after the disk has written all records."""
    warnings: list[str] = []
    writing, release = threading.Event(), threading.Event()

    def write(record: int) -> None:
        writing.set()
        assert release.wait(60)

    writer = BackgroundWriter(write, warnings.append, most=1, patience_s=0.1)
    writer.put(0)
    assert writing.wait(60)
    writer.put(1)
    assert not warnings
    for record in range(100):
        writer.put(record)
    assert writer._lost == 100
    assert writer._waited_s >= 0.1
    release.set()
    assert writer.wait(60.0)
    writer.put(0)
    assert writer._waited_s == 0.0, "the patience is renewed"


def test_writes_records_in_order_before_close_returns() -> None:
    written: list[int] = []
    writer = BackgroundWriter(written.append, pytest.fail)
    for record in range(500):
        writer.put(record)
    writer.close()
    assert written == list(range(500))
    writer._thread.join(30)
    assert not writer._thread.is_alive() and writer.close()


@pytest.mark.parametrize("error", [SystemExit(1), MemoryError()])
def test_error_of_a_library_loses_one_record(error: BaseException) -> None:
    written, warnings = list[int](), list[str]()

    def write(record: int) -> None:
        if record == 1:
            raise error
        written.append(record)

    writer = BackgroundWriter(write, warnings.append)
    for record in range(3):
        writer.put(record)
    assert writer.close()
    assert written == [0, 2]
    assert warnings[-1] == "1 records of metrics were not written"


def test_view_ignores_a_closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        view = View(out)
        for step in range(1, 4):
            view.on_step(StepSummary(step, 0, 0.5, 8, {"compute": 0.1}, 3))
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


@pytest.mark.sweep(2)
@pytest.mark.parametrize("output", ["text", "json"])
def test_submit_with_output_piped_to_head(output: str, tmp_path: Path) -> None:
    """Both streams go to a pipe whose reader closes it after the first line."""
    (tmp_path / "lin.py").write_text(TASK)
    (tmp_path / "job.json").write_text(json.dumps({**FIELDS, "task": "lin:Lin", "steps": 40}))
    (tmp_path / "job.json").rename(tmp_path / "job.yaml")
    command = [sys.executable, "-m", "distplat.cli.main", "submit", "job.yaml", "-o", output]
    submit = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert submit.stdout is not None
    assert submit.stdout.readline()
    submit.stdout.close()
    assert submit.wait(120) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["status"] == "SUCCEEDED"
    (model,) = tmp_path.rglob("model.safetensors")
    assert model.stat().st_size
