"""Trained files are written to the run's URL if the local disk rejects them."""

import json
import os
import threading
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from jobs import fields_of
from storages import FaultyFileSystem

from distplat.actors import trainer
from distplat.actors.controller_client import RunHandlers
from distplat.actors.result import Result
from distplat.actors.trainer import Trainer
from distplat.platform import disk, run_directory
from distplat.platform.errors import StorageError
from distplat.platform.memory_upload import upload_bytes
from distplat.platform.remote_storage import RemoteStorage
from distplat.platform.run_directory import RunDirectory

TASKS = Path(__file__).parents[1] / "cluster"
URL = "odd://bucket/runs"


@pytest.fixture(autouse=True)
def _reset_storage() -> Iterator[None]:
    FaultyFileSystem.reset()
    yield
    FaultyFileSystem.reset()


def trainer_of(folder: Path, **overrides: Any) -> Trainer:
    fields = {"task": "tasks_for_tests:Blobs", "optimizer": {"name": "SGD", "lr": 0.1}}
    job = fields_of(workers=0, **{**fields, "global_batch_size": 8, "epochs": 1, **overrides})
    folder.mkdir(exist_ok=True)
    return Trainer(job, working_dir=TASKS, storage_dir=folder)


def fill_the_disk(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Make writes of files of these names fail with ENOSPC on the local disk."""

    def write_atomically(path: Path, *args: Any) -> None:
        if path.name in names:
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        disk.write_atomically(path, *args)

    patch.setattr(run_directory, "write_atomically", write_atomically)


def read_from_url(url: str, name: str) -> bytes:
    return RemoteStorage(url, 240.0).read(name, 0, 2**20)


def test_model_is_written_to_the_url_if_the_local_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trainer_of(tmp_path / "one").fit()
    fill_the_disk(monkeypatch, "model.safetensors")
    with pytest.raises(StorageError, match="No space left") as raised:
        trainer_of(tmp_path / "two", storage_path=URL).fit()
    (run,) = (tmp_path / "two/runs").iterdir()
    assert raised.value.exit_code == 5
    run_url = f"{URL}/{run.name}"
    assert str(raised.value).endswith(f"trained files are at {run_url}: model.safetensors")
    assert expected.checkpoint is not None
    assert read_from_url(run_url, "model.safetensors") == expected.checkpoint.read_bytes()
    for text in ((run / "result.json").read_bytes(), read_from_url(run_url, "result.json")):
        facts = json.loads(text)
        assert (facts["status"], facts["model"]) == ("FAILED", f"{run_url}/model.safetensors")
    assert "model.safetensors is written to odd://" in caplog.text


def test_each_file_is_written_where_space_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = trainer_of(tmp_path).job
    directory, result = RunDirectory(job, "run", tmp_path), Result(tmp_path, None)
    files = trainer._TrainedFiles(directory, result, 240.0)
    files.keep("model.safetensors", b"model")
    files.check()
    assert files.model == str(result.checkpoint) == str(directory.path / "model.safetensors")
    fill_the_disk(monkeypatch, "embeddings.safetensors", "task.safetensors")
    with pytest.raises(StorageError, match=r"cannot write .*task\.safetensors: No space left"):
        files.keep("task.safetensors", b"task")
    result.url = f"{URL}/run"
    files.keep("embeddings.safetensors", b"rows")
    files.keep("model.safetensors", b"model")
    assert read_from_url(f"{URL}/run", "embeddings.safetensors") == b"rows"
    with pytest.raises(StorageError, match=rf"are at {URL}/run: embeddings\.safetensors$"):
        files.check()
    FaultyFileSystem.refuses = True
    monkeypatch.setattr(
        trainer, "upload_bytes", lambda url, name, data, _: upload_bytes(url, name, data, 0.01)
    )
    with pytest.raises(StorageError, match=r"No space left.*; nor to the URL: odd://bucket"):
        files.keep("task.safetensors", b"task")


def test_model_is_at_the_url_before_the_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blocked terminal may block the warning forever, so the upload must come first."""
    job = trainer_of(tmp_path).job
    directory, result = RunDirectory(job, "run", tmp_path), Result(tmp_path, None)
    result.url = f"{URL}/run"
    files = trainer._TrainedFiles(directory, result, 240.0)
    fill_the_disk(monkeypatch, "model.safetensors")
    uploads: list[object] = []

    def warn(text: str, *args: object) -> None:
        uploads.append((files.model, read_from_url(f"{URL}/run", "model.safetensors")))

    monkeypatch.setattr(trainer.logger, "warning", warn)
    files.keep("model.safetensors", b"model")
    assert uploads == [(f"{URL}/run/model.safetensors", b"model")]


def test_result_keeps_the_error_before_a_second_signal(tmp_path: Path) -> None:
    directory = RunDirectory(trainer_of(tmp_path).job, "run", tmp_path)
    error = KeyboardInterrupt()
    error.add_note("before that: the disk is full")
    trainer._record_failure(directory, Result(tmp_path, None), error, "")
    facts = json.loads((directory.path / "result.json").read_text())
    assert facts == {"status": "STOPPED", "error": "before that: the disk is full"}


@pytest.mark.parametrize("full", [False, True])
def test_result_has_a_model_delivered_after_a_second_signal(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for the writing thread; a driver in a notebook keeps running."""
    run_handlers = list[RunHandlers]()

    def train(self: Trainer, run: str, folder: Path, handlers: RunHandlers, *args: Any) -> None:
        run_handlers.append(handlers)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_train", train)
    if full:
        fill_the_disk(monkeypatch, "model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, storage_path=URL).fit()
    (run,) = (tmp_path / "runs").iterdir()
    facts = json.loads((run / "result.json").read_text())
    assert "model" not in facts
    run_handlers[0].on_model(b"model")
    location = f"{URL}/{run.name}/model.safetensors" if full else str(run / "model.safetensors")
    assert json.loads((run / "result.json").read_text()) == {**facts, "model": location}


def test_failed_upload_is_retried() -> None:
    FaultyFileSystem.failures = 1
    upload_bytes(URL, "model.safetensors", b"model" * 5, 240.0)
    assert read_from_url(URL, "model.safetensors") == b"model" * 5


def test_hanging_upload_times_out() -> None:
    FaultyFileSystem.hold = threading.Event()
    with pytest.raises(StorageError, match=rf"{URL}/model\.safetensors"):
        upload_bytes(URL, "model.safetensors", b"model", 0.2)
