"""What was trained goes to the run's URL where the local disk does not take it."""

import json
import os
import threading
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from jobs import fields_of
from storages import Odd

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
def _well() -> Iterator[None]:
    Odd.reset()
    yield
    Odd.reset()


def a_run(folder: Path, **more: Any) -> Trainer:
    fields = {"task": "tasks_for_tests:Blobs", "optimizer": {"name": "SGD", "lr": 0.1}}
    job = fields_of(workers=0, **{**fields, "global_batch_size": 8, "epochs": 1, **more})
    folder.mkdir(exist_ok=True)
    return Trainer(job, working_dir=TASKS, storage_dir=folder)


def fill_the_disk(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Have the local disk refuse files of these names."""

    def write_atomically(path: Path, *args: Any) -> None:
        if path.name in names:
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        disk.write_atomically(path, *args)

    patch.setattr(run_directory, "write_atomically", write_atomically)


def at(url: str, name: str) -> bytes:
    return RemoteStorage(url, 240.0).read(name, 0, 2**20)


def test_a_model_that_the_local_disk_does_not_take_is_at_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = a_run(tmp_path / "one").fit()
    fill_the_disk(monkeypatch, "model.safetensors")
    with pytest.raises(StorageError, match="No space left") as raised:
        a_run(tmp_path / "two", storage_path=URL).fit()
    (run,) = (tmp_path / "two/runs").iterdir()
    assert raised.value.exit_code == 5
    there = f"{URL}/{run.name}"
    assert str(raised.value).endswith(f"trained files are at {there}: model.safetensors")
    assert whole.checkpoint is not None
    assert at(there, "model.safetensors") == whole.checkpoint.read_bytes()
    for text in ((run / "result.json").read_bytes(), at(there, "result.json")):
        facts = json.loads(text)
        assert (facts["status"], facts["model"]) == ("FAILED", f"{there}/model.safetensors")
    assert "model.safetensors is written to odd://" in caplog.text


def test_each_file_goes_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    directory, result = RunDirectory(run.job, "run", tmp_path), Result(tmp_path, None)
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
    assert at(f"{URL}/run", "embeddings.safetensors") == b"rows"
    with pytest.raises(StorageError, match=rf"are at {URL}/run: embeddings\.safetensors$"):
        files.check()
    Odd.refuses = True
    monkeypatch.setattr(
        trainer, "upload_bytes", lambda url, name, data, _: upload_bytes(url, name, data, 0.01)
    )
    with pytest.raises(StorageError, match=r"No space left.*; nor to the URL: odd://bucket"):
        files.keep("task.safetensors", b"task")


def test_a_terminal_that_takes_no_more_keeps_no_model_from_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning may wait for ever: it comes when the file is there, and is known to be."""
    run = a_run(tmp_path)
    directory, result = RunDirectory(run.job, "run", tmp_path), Result(tmp_path, None)
    result.url = f"{URL}/run"
    files = trainer._TrainedFiles(directory, result, 240.0)
    fill_the_disk(monkeypatch, "model.safetensors")
    told: list[object] = []

    def warn(text: str, *args: object) -> None:
        told.append((files.model, at(f"{URL}/run", "model.safetensors")))

    monkeypatch.setattr(trainer.logger, "warning", warn)
    files.keep("model.safetensors", b"model")
    assert told == [(f"{URL}/run/model.safetensors", b"model")]


def test_what_happened_before_a_second_signal_is_in_the_result(tmp_path: Path) -> None:
    directory = RunDirectory(a_run(tmp_path).job, "run", tmp_path)
    error = KeyboardInterrupt()
    error.add_note("before that: the disk is full")
    trainer._record_failure(directory, Result(tmp_path, None), error, "")
    facts = json.loads((directory.path / "result.json").read_text())
    assert facts == {"status": "STOPPED", "error": "before that: the disk is full"}


@pytest.mark.parametrize("full", [False, True])
def test_a_model_that_comes_after_a_second_signal_is_in_the_result(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes it is not waited for; the driver may live on, as in a notebook."""
    late = list[Any]()

    def train(self: Trainer, run: str, folder: Path, handlers: RunHandlers, *args: Any) -> None:
        late.append(handlers)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_train", train)
    if full:
        fill_the_disk(monkeypatch, "model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        a_run(tmp_path, storage_path=URL).fit()
    (run,) = (tmp_path / "runs").iterdir()
    facts = json.loads((run / "result.json").read_text())
    assert "model" not in facts
    late[0].on_model(b"model")
    where = f"{URL}/{run.name}/model.safetensors" if full else str(run / "model.safetensors")
    assert json.loads((run / "result.json").read_text()) == {**facts, "model": where}


def test_a_storage_that_fails_is_tried_again() -> None:
    Odd.failures = 1
    upload_bytes(URL, "model.safetensors", b"model" * 5, 240.0)
    assert at(URL, "model.safetensors") == b"model" * 5


def test_a_storage_that_hangs_is_given_up() -> None:
    Odd.hold = threading.Event()
    with pytest.raises(StorageError, match=rf"{URL}/model\.safetensors"):
        upload_bytes(URL, "model.safetensors", b"model", 0.2)
