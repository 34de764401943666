"""Trackers of experiments: one run there for one run here; what fails there costs no step."""

import importlib
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from jobs import fields_of, job_of
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Job, Result, Task, Trainer
from distplat.actors import callbacks
from distplat.platform import trackers
from distplat.platform.disk import BackgroundWriter
from distplat.platform.errors import Interrupted, SpecError, StorageError, UserCodeError
from distplat.platform.progress import EvalSummary, StepSummary
from distplat.platform.trackers import TrackerSpec, Trackio, WandB, points_of


class Lin(Task):
    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(torch.ones(8, 2), torch.ones(8, 1))

    def eval_data(self) -> Dataset[Any]:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.fails:
            raise KeyError("no such thing")
        return nn.functional.mse_loss(outputs, targets)


class Book:
    """A tracker that notes what it is told."""

    opened: list["Book"]

    def __init__(self, project: str, job: Any, folder: Path, known: str | None) -> None:
        self.project, self.known, self.id = project, known, known or f"run-{len(self.opened)}"
        self.steps: list[tuple[int, list[str]]] = []
        self.failed: bool | None = None
        self.opened.append(self)

    def write(self, step: int, points: dict[str, float]) -> None:
        kinds = {name.split("/")[0] for name in points}
        self.steps.append((step, sorted(kinds & {"train", "eval"})))

    def close(self, failed: bool) -> None:
        self.failed = failed


class Broken(Book):
    def __init__(self, project: str, job: Any, folder: Path, known: str | None) -> None:
        super().__init__(project, job, folder, known)
        raise ConnectionError("no route to the server")


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> type[Book]:
    Book.opened = []
    monkeypatch.setattr(trackers, "MLflow", Book)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    return Book


def spec(tmp_path: Path, tracker: Any = "mlflow", steps: int = 3, **more: Any) -> dict[str, Any]:
    fields = fields_of("ring", 0, steps=steps, checkpoint={"every_steps": 3}, **more)
    return {**fields, "trackers": [tracker], "storage_path": str(tmp_path)}


def test_the_names_of_points_are_those_of_the_curves() -> None:
    step = StepSummary(3, 0, 0.5, 8, {"data": 0.1}, 9, {"lr": 0.2})
    assert points_of(step) == {
        **{"train/loss": 0.5, "train/samples": 8.0},
        **{"seconds/data": 0.1, "figures/lr": 0.2},
    }
    assert points_of(EvalSummary(3, 8, {"accuracy": 0.75})) == {"eval/accuracy": 0.75}


def test_a_run_is_one_run_and_goes_on_as_one(book: type[Book], tmp_path: Path) -> None:
    first = Trainer(spec(tmp_path), Lin).fit()
    given = spec(tmp_path, {"name": "mlflow", "project": "digits"}, steps=5)
    Trainer(given, Lin, resume=first.path).fit()
    begun, resumed = book.opened
    train, evaluated = ["train"], ["eval"]  # an epoch has two steps
    assert begun.steps == [(1, train), (2, train), (2, evaluated), (3, train), (3, evaluated)]
    assert [step for step, kinds in resumed.steps if kinds == train] == [4, 5]
    assert (begun.project, begun.known, begun.failed) == ("test", None, False)
    assert (resumed.project, resumed.known, resumed.failed) == ("digits", begun.id, False)
    assert json.loads((first.path / "tracker_mlflow.json").read_text()) == {"id": begun.id}


@pytest.mark.parametrize(
    "content",
    [
        *('{"id": "../other"}', '{"id": "a/b"}', '{"id": ""}', '{"id": 5}', "[]", "{}", "[" * 9000),
        '{"id": "' + "a" * 300 + '"}',
    ],
)
def test_an_id_of_no_tracker_is_not_gone_on_with(
    content: str, book: type[Book], tmp_path: Path
) -> None:
    (tmp_path / "tracker_mlflow.json").write_text(content)
    with pytest.raises(StorageError, match=r"tracker_mlflow.json has no id of a tracker's run"):
        _open(tmp_path)
    assert not book.opened


def test_an_id_behind_a_link_is_not_read(book: type[Book], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text('{"id": "mine"}')
    (tmp_path / "tracker_mlflow.json").symlink_to(tmp_path / "mine")
    with pytest.raises(StorageError, match="it is a link"):
        _open(tmp_path)
    assert not book.opened


def _open(before: Path) -> Any:
    job = job_of("ring", 0)
    return trackers.open_tracker(TrackerSpec(name="mlflow", project=None), job, before, before)


def test_a_run_that_fails_is_shown_as_one(book: type[Book], tmp_path: Path) -> None:
    with pytest.raises(UserCodeError):
        Trainer(spec(tmp_path, task_args={"fails": True}), Lin).fit()
    assert [one.failed for one in book.opened] == [True]


def test_a_run_that_ends_before_its_trackers_begin_is_not_shown(
    book: type[Book], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    never = {**spec(tmp_path), "storage_path": f"file://{tmp_path}/file/below"}
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match="nothing was trained"):
        Trainer(never, Lin, storage_dir=tmp_path).fit()
    assert not caplog.text and not book.opened


def test_a_tracker_that_fails_costs_no_step(
    book: type[Book],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(trackers, "MLflow", Broken)
    with caplog.at_level(logging.WARNING):
        result = Trainer(spec(tmp_path), Lin).fit()
    assert result.totals.steps == 3 and len(book.opened) == 1, "it is tried once"
    assert caplog.text.count("no route to the server") == 1
    assert "mlflow: 6 records" in caplog.text


@pytest.mark.parametrize("stopped", [True, False])
def test_trackers_that_hang_are_waited_for_together_and_it_is_said(
    stopped: bool,
    book: type[Book],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An interrupted run waits less: who sent the signal may be about to kill the process."""
    hang, waits = threading.Event(), list[float]()

    class Hanging(Book):
        def close(self, failed: bool) -> None:
            hang.wait(30)

    def close(writer: object, limit_s: float) -> None:
        waits.append(limit_s)

    monkeypatch.setattr(trackers, "MLflow", Hanging)
    monkeypatch.setattr(trackers, "WandB", Hanging)
    monkeypatch.setattr(callbacks, "_SAY_AFTER_S", 0.05)
    monkeypatch.setattr(BackgroundWriter, "close", close)
    job = Job.model_validate({**fields_of("ring", 0), "trackers": ["mlflow", "wandb"]})
    tracking = callbacks.Tracking(job.trackers, None)
    tracking.on_start(job, "run", tmp_path)
    with caplog.at_level(logging.WARNING):
        tracking.on_end(Result(tmp_path, None), Interrupted(2) if stopped else None)
    hang.set()
    limit_s = 10.0 if stopped else 60.0
    assert len(waits) == 2 and all(limit_s - 5 < one < limit_s for one in waits)
    assert f"on their way to mlflow, wandb, {limit_s:.0f} s at most" in caplog.text


@pytest.mark.parametrize(
    "given, told",
    [
        (["mlflow", "mlflow"], r"trackers\.1.*'mlflow' is listed twice"),
        (["mflow"], r"did you mean 'mlflow'\?"),
        ([{"name": "wandb", "entity": "me"}], "unknown field"),
    ],
)
def test_what_is_wrong_with_a_list_of_trackers(given: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Trainer({**fields_of("ring", 0), "trackers": given}, Lin)


def test_a_library_that_is_not_installed_is_told_before_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"needs the package mlflow(.|\n)*distplat\[mlflow\]"):
        Trainer(spec(tmp_path), Lin)


def test_a_dumped_list_of_trackers_is_read_again() -> None:
    job = Job.model_validate({**fields_of("ring", 0), "trackers": ["wandb", {"name": "mlflow"}]})
    assert Job.model_validate(job.model_dump()) == job


@pytest.mark.parametrize("kind", [Trackio, WandB])
def test_a_key_in_a_job_does_not_reach_the_tracker(
    kind: type[Trackio | WandB], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    library = MagicMock()
    library.init.side_effect = lambda *args, **more: given.update(more) or MagicMock()
    monkeypatch.setitem(sys.modules, kind.__name__.lower(), library)
    args = {"hf_token": "canary", "layers": 3}
    kind("project", Job.model_validate(spec(tmp_path) | {"task_args": args}), tmp_path, None)
    assert given["config"]["task_args"] == {"hf_token": "***", "layers": 3}


def test_mlflow_has_one_run_of_two_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # elsewhere it is a server's
    first = Trainer(spec(tmp_path), Lin).fit()
    Trainer(spec(tmp_path, steps=5), Lin, resume=first.path).fit()
    client = tracking.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [one.step for one in losses] == [1, 2, 3, 4, 5]
    assert (run.info.status, run.data.params["optimizer.lr"]) == ("FINISHED", "0.1")
    assert "eval/loss" in run.data.metrics


def test_weights_and_biases_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = Trainer(spec(tmp_path, "wandb"), Lin).fit()
    (written,) = result.path.glob("wandb/offline-run-*/*.wandb")
    run = json.loads((result.path / "tracker_wandb.json").read_text())["id"]
    assert run in written.name and b"train/loss" in written.read_bytes()


def test_trackio_has_one_run_of_two_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    first = Trainer(spec(tmp_path, "trackio"), Lin).fit()
    Trainer(spec(tmp_path, "trackio", steps=5), Lin, resume=first.path).fit()
    (run,) = trackio.Api().runs("test")
    assert run.name == first.path.name and run.config["optimizer"]["lr"] == 0.1
    logs = importlib.import_module("trackio.sqlite_storage").SQLiteStorage.get_logs(
        "test", run.name
    )
    assert [one["step"] for one in logs if "train/loss" in one] == [1, 2, 3, 4, 5]
    assert any("eval/loss" in one for one in logs)
    assert capsys.readouterr().out == "", "stdout is for the result"
