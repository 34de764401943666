"""Who watches a run does not end it: callbacks, a pipe that is closed, a disk without room."""

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


class Login(Callback):
    """Waits for a password, until Ctrl-C."""

    def on_start(self, job: Job, run: str, path: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(10)


def test_a_signal_while_a_callback_begins_leaves_a_result(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        Trainer(FIELDS, Lin, storage_dir=tmp_path, callbacks=(Login(),)).fit()
    assert time.monotonic() - began < 10
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["status"] == "STOPPED"


def test_a_signal_while_the_model_is_written_waits_for_it(
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
    said = json.loads(result.read_text())
    assert said["status"] == "STOPPED" and Path(said["model"]).exists()


class Seeing(Callback):
    """Notes what it is told; raises in one of its methods."""

    def __init__(self, raises_in: str = "", error: BaseException | None = None) -> None:
        self.raises_in, self.error = raises_in, error
        self.told: list[str] = []

    def _take(self, what: str) -> None:
        self.told.append(what)
        if what == self.raises_in and self.error is not None:
            raise self.error

    def on_start(self, job: Job, run: str, path: Path) -> None:
        self._take("start")

    def on_step(self, step: StepSummary) -> None:
        self._take(f"step {step.step}")

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        self._take(f"evaluation {evaluation.step}")

    def on_checkpoint(self, checkpoint: Saved) -> None:
        self._take(f"checkpoint {checkpoint.step}")

    def on_failure(self, failure: FailureEvent) -> None:
        self._take("failure")

    def on_recovery(self, recovery: Recovery) -> None:
        self._take("recovery")

    def on_resize(self, resized: Resized) -> None:
        self._take("resize")

    def on_end(self, result: Result, error: BaseException | None) -> None:
        ended = "well" if error is None else type(error).__name__
        self._take(f"end {ended} with {result.totals.steps} steps")


STEPS = [f"step {number}" for number in range(1, 7)]
GONE = OSError("the terminal is gone")


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("start", GONE),
        ("start", asyncio.CancelledError()),
        ("step 1", GONE),
        ("step 1", SystemExit(0)),
        ("end well with 6 steps", GONE),
        ("end well with 6 steps", SystemExit(0)),
    ],
)
def test_a_callback_that_raises_is_called_no_more(
    method: str, error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Seeing(method, error), Seeing()
    spec = {**FIELDS, "storage_path": str(tmp_path)}
    with caplog.at_level(logging.WARNING):
        result = Trainer(spec, Lin, callbacks=(bad, good)).fit()
    assert bad.told[-1] == method
    assert good.told == ["start", *STEPS, "end well with 6 steps"]
    assert caplog.text.count("continues without it") == 1
    assert json.loads((result.path / "result.json").read_text())["status"] == "SUCCEEDED"


def test_of_callbacks_that_are_equal_the_one_that_raised_goes() -> None:
    """As those of a dataclass may be."""

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

    good, bad = Equal(None), Equal(GONE)
    callbacks = Callbacks([good, bad])
    for step in (1, 2):
        callbacks.tell(StepSummary(step, 0, 0.5, 4, {}))
    assert (good.steps, bad.steps) == ([1, 2], [1])


def test_who_is_at_the_terminal_ends_the_run_wherever_it_is(tmp_path: Path) -> None:
    bad, good = Seeing("start", KeyboardInterrupt()), Seeing()
    with pytest.raises(KeyboardInterrupt):
        Trainer({**FIELDS, "storage_path": str(tmp_path)}, Lin, callbacks=(bad, good)).fit()
    assert good.told == ["end KeyboardInterrupt with 0 steps"]
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["status"] == "STOPPED"


def test_a_callback_that_does_not_return_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("distplat.actors.callbacks._LOOK_S", 0.005)
    now, looks = [0.0], threading.Semaphore(0)

    def clock() -> float:
        if threading.current_thread().name == "callbacks":
            looks.release()
        return now[0]

    def wait_for_looks() -> None:
        """What the first of them has to say is said, for the others come after it."""
        while looks.acquire(blocking=False):
            pass
        assert all(looks.acquire(timeout=30) for _ in range(3))

    class Hangs(Callback):
        def on_step(self, step: StepSummary) -> None:
            wait_for_looks()

        def on_evaluation(self, evaluation: EvalSummary) -> None:
            now[0] += 130.0
            wait_for_looks()

    callbacks = Callbacks([Hangs(), Seeing()], clock=clock)
    callbacks.start(Trainer(FIELDS, Lin).job, "run", Path())
    callbacks.tell(StepSummary(1, 0, 0.5, 4, {}))
    assert not caplog.text, "who returns is not"
    callbacks.tell(EvalSummary(1, 8, {}))
    callbacks.tell(EvalSummary(2, 8, {}))
    callbacks.end(Result(Path(), None), None)
    assert caplog.text.count("the callback Hangs has not returned for 120 s") == 1


class Raising(Lin):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("no such thing")


def test_callbacks_hear_of_evaluations_checkpoints_and_the_end(tmp_path: Path) -> None:
    seeing = Seeing()
    spec = {**FIELDS, "storage_path": str(tmp_path), "evaluation": {"every_steps": 3}}
    Trainer({**spec, "checkpoint": {"every_steps": 6}}, Evaluated, callbacks=[seeing]).fit()
    last = ["evaluation 6", "checkpoint 6", "end well with 6 steps"]
    assert seeing.told == ["start", *STEPS[:3], "evaluation 3", *STEPS[3:], *last]
    raising = Seeing()
    with pytest.raises(UserCodeError):
        Trainer(spec, Raising, callbacks=[raising]).fit()
    assert raising.told == ["start", "end UserCodeError with 0 steps"]


def test_what_goes_on_without_a_failure_is_told_by_its_kind() -> None:
    seeing = Seeing()
    callbacks = Callbacks([seeing])
    callbacks.tell(FailureEvent(1, 0, "lost", ("worker-0",), 0.0))
    callbacks.tell(Recovery(1, 0.5))
    callbacks.tell(Resized(1, 2, 2, 3, 0.5))
    assert seeing.told == ["failure", "recovery", "resize"]


class Misspelt(Callback):
    def on_train_step(self) -> None:
        """Nobody would call it."""


@pytest.mark.parametrize(
    "given, told",
    [
        (Misspelt(), r"callbacks\.1: Misspelt\.on_train_step would never be called"),
        (Seeing, r"callbacks\.1: type is no distplat\.Callback"),
    ],
)
def test_what_is_no_callback_is_refused(given: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Trainer(FIELDS, Lin, callbacks=[Seeing(), given])


def test_metrics_that_cannot_be_written_cost_no_step(
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


def test_curves_that_cannot_be_drawn_cost_no_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorBoard's library does not go with another one that is installed, for example."""

    def broken(path: Path) -> None:
        raise ImportError("protobuf is too old")

    monkeypatch.setattr("distplat.platform.run_directory._TensorBoard", broken)
    with caplog.at_level(logging.WARNING):
        result = Trainer({**FIELDS, "storage_path": str(tmp_path)}, Lin).fit()
    assert len((result.path / "metrics.jsonl").read_text().splitlines()) == 6
    assert caplog.text.count("TensorBoard's curves are lost") == 1
    assert "metrics are lost" not in caplog.text and "records of metrics" not in caplog.text


def test_what_fails_after_the_training_does_not_cost_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An embedding server that dies while its tables are saved, for example."""

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


def test_a_result_that_cannot_be_written_does_not_hide_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: RunDirectory, status: str, facts: object) -> None:
        raise StorageError("cannot write result.json: No space left on device")

    monkeypatch.setattr(RunDirectory, "finish", full)
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match=r"result\.json"):
        Trainer({**FIELDS, "storage_path": str(tmp_path)}, Lin).fit()
    (model,) = tmp_path.rglob("model.safetensors")
    assert f"the trained model was saved to {model}" in caplog.text


def test_a_disk_that_hangs_holds_nobody_up() -> None:
    said: list[str] = []
    hangs, goes_on = threading.Event(), threading.Event()

    def write(record: int) -> None:
        hangs.set()
        assert goes_on.wait(30)

    writer = BackgroundWriter(write, said.append, most=2)
    writer.put(0)
    assert hangs.wait(30)
    for record in range(1, 6):
        writer.put(record)
    assert len(said) == 1 and "the disk does not answer" in said[0]
    writer.close(0.05)
    assert said[1] == "6 records of metrics were not written"
    goes_on.set()


def test_a_burst_of_records_waits_for_a_disk_that_takes_them() -> None:
    """Thousands of steps are told at once, after a callback that held the driver up."""
    written: list[int] = []
    writer = BackgroundWriter(written.append, pytest.fail, most=2, patience_s=60.0)
    for record in range(5000):
        writer.put(record)
    assert writer.close(60.0)
    assert written == list(range(5000))


def test_a_disk_that_hangs_is_waited_for_once() -> None:
    """The patience is for all records, until the disk has caught up."""
    said: list[str] = []
    hangs, goes_on = threading.Event(), threading.Event()

    def write(record: int) -> None:
        hangs.set()
        assert goes_on.wait(60)

    writer = BackgroundWriter(write, said.append, most=1, patience_s=0.1)
    writer.put(0)
    assert hangs.wait(60)
    writer.put(1)
    assert not said
    for record in range(100):
        writer.put(record)
    assert writer._lost == 100
    assert writer._waited_s >= 0.1
    goes_on.set()
    assert writer.wait(60.0)
    writer.put(0)
    assert writer._waited_s == 0.0, "it has caught up, and is waited for again"


def test_records_are_written_in_order_before_the_end() -> None:
    written: list[int] = []
    writer = BackgroundWriter(written.append, pytest.fail)
    for record in range(500):
        writer.put(record)
    writer.close()
    assert written == list(range(500))


@pytest.mark.parametrize("error", [SystemExit(1), MemoryError()])
def test_what_a_library_raises_costs_one_record(error: BaseException) -> None:
    written, said = list[int](), list[str]()

    def write(record: int) -> None:
        if record == 1:
            raise error
        written.append(record)

    writer = BackgroundWriter(write, said.append)
    for record in range(3):
        writer.put(record)
    assert writer.close()
    assert written == [0, 2]
    assert said[-1] == "1 records of metrics were not written"


def test_a_view_whose_pipe_is_closed_draws_no_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        view = View(out)
        for step in range(1, 4):
            view.on_step(StepSummary(step, 0, 0.5, 8, {"compute": 0.1}, 3))
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


@pytest.mark.sweep(2)
@pytest.mark.parametrize("output", ["text", "json"])
def test_submit_behind_head(output: str, tmp_path: Path) -> None:
    """Both streams end in a pipe whose reader leaves after the first line."""
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
