"""Experiment trackers: one tracker run per run; their errors do not fail the run."""

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


class LinearTask(Task):
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
            raise KeyError("invalid key")
        return nn.functional.mse_loss(outputs, targets)


class RecordingTracker:
    """Records its calls."""

    opened: list["RecordingTracker"]

    def __init__(self, project: str, job: Any, folder: Path, known: str | None) -> None:
        self.project, self.known, self.id = project, known, known or f"run-{len(self.opened)}"
        self.steps: list[tuple[int, list[str]]] = []
        self.failed: bool | None = None
        self.opened.append(self)

    def write(self, step: int, points: dict[str, float]) -> None:
        groups = {name.split("/")[0] for name in points}
        self.steps.append((step, sorted(groups & {"train", "eval"})))

    def close(self, failed: bool) -> None:
        self.failed = failed


class FailingTracker(RecordingTracker):
    def __init__(self, project: str, job: Any, folder: Path, known: str | None) -> None:
        super().__init__(project, job, folder, known)
        raise ConnectionError("no route to the server")


@pytest.fixture
def tracker_class(monkeypatch: pytest.MonkeyPatch) -> type[RecordingTracker]:
    RecordingTracker.opened = []
    monkeypatch.setattr(trackers, "MLflow", RecordingTracker)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    return RecordingTracker


def spec(tmp_path: Path, tracker: Any = "mlflow", steps: int = 3, **more: Any) -> dict[str, Any]:
    fields = fields_of("ring", 0, steps=steps, checkpoint={"every_steps": 3}, **more)
    return {**fields, "trackers": [tracker], "storage_path": str(tmp_path)}


def test_points_of_uses_the_names_of_metrics_jsonl() -> None:
    step = StepSummary(3, 0, 0.5, 8, {"data": 0.1}, 9, {"lr": 0.2})
    assert points_of(step) == {
        **{"train/loss": 0.5, "train/samples": 8.0},
        **{"seconds/data": 0.1, "figures/lr": 0.2},
    }
    assert points_of(EvalSummary(3, 8, {"accuracy": 0.75})) == {"eval/accuracy": 0.75}


def test_resumed_run_continues_the_trackers_run(
    tracker_class: type[RecordingTracker], tmp_path: Path
) -> None:
    result = Trainer(spec(tmp_path), LinearTask).fit()
    fields = spec(tmp_path, {"name": "mlflow", "project": "digits"}, steps=5)
    Trainer(fields, LinearTask, resume=result.path).fit()
    first, second = tracker_class.opened
    train, evaluated = ["train"], ["eval"]  # an epoch has two steps
    assert first.steps == [(1, train), (2, train), (2, evaluated), (3, train), (3, evaluated)]
    assert [step for step, groups in second.steps if groups == train] == [4, 5]
    assert (first.project, first.known, first.failed) == ("test", None, False)
    assert (second.project, second.known, second.failed) == ("digits", first.id, False)
    assert json.loads((result.path / "tracker_mlflow.json").read_text()) == {"id": first.id}


@pytest.mark.parametrize(
    "content",
    [
        *('{"id": "../other"}', '{"id": "a/b"}', '{"id": ""}', '{"id": 5}', "[]", "{}", "[" * 9000),
        '{"id": "' + "a" * 300 + '"}',
    ],
)
def test_invalid_tracker_id_is_rejected(
    content: str, tracker_class: type[RecordingTracker], tmp_path: Path
) -> None:
    (tmp_path / "tracker_mlflow.json").write_text(content)
    with pytest.raises(StorageError, match=r"tracker_mlflow.json has no id of a tracker's run"):
        _open(tmp_path)
    assert not tracker_class.opened


def test_tracker_id_behind_a_symlink_is_rejected(
    tracker_class: type[RecordingTracker], tmp_path: Path
) -> None:
    (tmp_path / "target").write_text('{"id": "target"}')
    (tmp_path / "tracker_mlflow.json").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError, match="it is a link"):
        _open(tmp_path)
    assert not tracker_class.opened


def _open(before: Path) -> Any:
    job = job_of("ring", 0)
    return trackers.open_tracker(TrackerSpec(name="mlflow", project=None), job, before, before)


def test_failed_run_is_marked_as_failed(
    tracker_class: type[RecordingTracker], tmp_path: Path
) -> None:
    with pytest.raises(UserCodeError):
        Trainer(spec(tmp_path, task_args={"fails": True}), LinearTask).fit()
    assert [opened.failed for opened in tracker_class.opened] == [True]


def test_run_that_fails_before_it_starts_opens_no_tracker(
    tracker_class: type[RecordingTracker], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    unstarted = {**spec(tmp_path), "storage_path": f"file://{tmp_path}/file/below"}
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match="nothing was trained"):
        Trainer(unstarted, LinearTask, storage_dir=tmp_path).fit()
    assert not caplog.text and not tracker_class.opened


def test_tracker_error_does_not_fail_the_run(
    tracker_class: type[RecordingTracker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(trackers, "MLflow", FailingTracker)
    with caplog.at_level(logging.WARNING):
        result = Trainer(spec(tmp_path), LinearTask).fit()
    assert result.totals.steps == 3 and len(tracker_class.opened) == 1, "the tracker is opened once"
    assert caplog.text.count("no route to the server") == 1
    assert "mlflow: 6 records" in caplog.text


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_hanging_trackers_share_one_deadline(
    is_interrupted: bool,
    tracker_class: type[RecordingTracker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An interrupted run waits less, because SIGKILL may follow the signal."""
    hang, waits = threading.Event(), list[float]()

    class HangingTracker(RecordingTracker):
        def close(self, failed: bool) -> None:
            hang.wait(30)

    def close(writer: object, limit_s: float) -> None:
        waits.append(limit_s)

    monkeypatch.setattr(trackers, "MLflow", HangingTracker)
    monkeypatch.setattr(trackers, "WandB", HangingTracker)
    monkeypatch.setattr(callbacks, "_SAY_AFTER_S", 0.05)
    monkeypatch.setattr(BackgroundWriter, "close", close)
    job = Job.model_validate({**fields_of("ring", 0), "trackers": ["mlflow", "wandb"]})
    tracking = callbacks.Tracking(job.trackers, None)
    tracking.on_start(job, "run", tmp_path)
    with caplog.at_level(logging.WARNING):
        tracking.on_end(Result(tmp_path, None), Interrupted(2) if is_interrupted else None)
    hang.set()
    limit_s = 10.0 if is_interrupted else 60.0
    assert len(waits) == 2 and all(limit_s - 5 < wait < limit_s for wait in waits)
    assert f"on their way to mlflow, wandb, {limit_s:.0f} s at most" in caplog.text


@pytest.mark.parametrize(
    "names, message",
    [
        (["mlflow", "mlflow"], r"trackers\.1.*'mlflow' is listed twice"),
        (["mflow"], r"did you mean 'mlflow'\?"),
        ([{"name": "wandb", "entity": "me"}], "unknown field"),
    ],
)
def test_invalid_trackers_are_rejected(names: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Trainer({**fields_of("ring", 0), "trackers": names}, LinearTask)


def test_missing_package_is_reported_before_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"needs the package mlflow(.|\n)*distplat\[mlflow\]"):
        Trainer(spec(tmp_path), LinearTask)


def test_trackers_round_trip_through_model_dump() -> None:
    job = Job.model_validate({**fields_of("ring", 0), "trackers": ["wandb", {"name": "mlflow"}]})
    assert Job.model_validate(job.model_dump()) == job


@pytest.mark.parametrize("cls", [Trackio, WandB])
def test_secrets_of_the_job_are_masked(
    cls: type[Trackio | WandB], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_args: dict[str, Any] = {}
    library = MagicMock()
    library.init.side_effect = lambda *args, **kwargs: init_args.update(kwargs) or MagicMock()
    monkeypatch.setitem(sys.modules, cls.__name__.lower(), library)
    args = {"hf_token": "canary", "layers": 3}
    cls("project", Job.model_validate(spec(tmp_path) | {"task_args": args}), tmp_path, None)
    assert init_args["config"]["task_args"] == {"hf_token": "***", "layers": 3}


def test_mlflow_has_one_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # production uses a server
    first = Trainer(spec(tmp_path), LinearTask).fit()
    Trainer(spec(tmp_path, steps=5), LinearTask, resume=first.path).fit()
    client = tracking.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [loss.step for loss in losses] == [1, 2, 3, 4, 5]
    assert (run.info.status, run.data.params["optimizer.lr"]) == ("FINISHED", "0.1")
    assert "eval/loss" in run.data.metrics


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = Trainer(spec(tmp_path, "wandb"), LinearTask).fit()
    (written,) = result.path.glob("wandb/offline-run-*/*.wandb")
    run = json.loads((result.path / "tracker_wandb.json").read_text())["id"]
    assert run in written.name and b"train/loss" in written.read_bytes()


def test_trackio_has_one_run_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    first = Trainer(spec(tmp_path, "trackio"), LinearTask).fit()
    Trainer(spec(tmp_path, "trackio", steps=5), LinearTask, resume=first.path).fit()
    (run,) = trackio.Api().runs("test")
    assert run.name == first.path.name and run.config["optimizer"]["lr"] == 0.1
    logs = importlib.import_module("trackio.sqlite_storage").SQLiteStorage.get_logs(
        "test", run.name
    )
    assert [entry["step"] for entry in logs if "train/loss" in entry] == [1, 2, 3, 4, 5]
    assert any("eval/loss" in entry for entry in logs)
    assert capsys.readouterr().out == "", "stdout is for the result"
