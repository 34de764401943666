"""Hung disks: training continues, and the run ends within `failure.storage_timeout_s`."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jobs import fields_of
from line_task import Lin
from uploads import TASKS, upload_checkpoints

from distplat import Trainer
from distplat.actors import role_output
from distplat.actors.checkpointing import Checkpoints, newest_checkpoint
from distplat.cli.main import run as command
from distplat.platform import checkpoints, disk
from distplat.platform.checkpoints import Catalogue
from distplat.platform.disk import OnProgress, RecordFile, with_deadline, write_atomically
from distplat.platform.errors import StorageError
from distplat.platform.remote_storage import fetch
from distplat.platform.run_upload import upload_of

LIMIT_S = 0.5
_BLOCK_S = 90.0
"""Limit for a blocked operation that the test does not release; below the timeout of a test."""


class HungDisk:
    """
    Patched operations of this process that block until the end of the test, once `hangs` is set.

    The clock of `with_deadline` stands still until an operation blocks, because healthy operations
    may be slow on a busy machine.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.hangs, self._test_ended = threading.Event(), threading.Event()
        self._patch = patch
        self.timed_out = False  #: an operation blocked for `_BLOCK_S`: a caller may have waited
        self._since: float | None = None
        self.sleep = time.sleep
        patch.setattr(disk, "time", self)

    def monotonic(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    def patch(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            if self.hangs.is_set():
                self._since = self._since or time.monotonic()
                self.timed_out = not self._test_ended.wait(_BLOCK_S) or self.timed_out
                raise OSError("blocked until the end of the test")
            return real(*args, **kwargs)

        self._patch.setattr(owner, name, operation)

    def end(self) -> None:
        self._test_ended.set()


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[HungDisk]:
    hung_disk = HungDisk(monkeypatch)
    yield hung_disk
    hung_disk.end()


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_deadline_restarts_on_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(disk, "time", clock)

    def work(on_progress: OnProgress) -> str:
        for _ in range(6):
            clock.now += LIMIT_S / 2
            on_progress()
        return "done"

    assert with_deadline(work, Path("/there"), LIMIT_S) == "done"
    over = threading.Event()

    def hang(on_progress: OnProgress) -> None:
        clock.now += 2 * LIMIT_S
        assert over.wait(60)

    with pytest.raises(StorageError, match=rf"^/there: no answer within {LIMIT_S} s") as raised:
        with_deadline(hang, Path("/there"), LIMIT_S)
    with pytest.raises(StorageError, match=r"its disk does not answer$"):
        with_deadline(hang, Path("/there"), LIMIT_S, setting="")
    over.set()
    assert "`failure.storage_timeout_s` changes this deadline" in str(raised.value)
    with pytest.raises(KeyError, match="'a'"):
        with_deadline(lambda on_progress: os.environ["a"], Path("/there"), LIMIT_S)


def test_write_atomically_reports_progress_per_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_PIECE_BYTES", 10)
    calls: list[int] = []
    write_atomically(tmp_path / "a", b"x" * 25, lambda: calls.append(1))
    assert (tmp_path / "a").read_bytes() == b"x" * 25
    assert len(calls) == 3


def fields(folder: Path, **more: Any) -> dict[str, Any]:
    failure = {"storage_timeout_s": LIMIT_S}
    job = fields_of("ring", 0, epochs=None, steps=6, global_batch_size=16, failure=failure)
    return {**job, "storage_path": str(folder), **more}


@pytest.mark.parametrize("operation", ["fsync", "open"])
def test_run_on_a_hung_disk_fails_with_the_cause(
    operation: str, hung: HungDisk, tmp_path: Path
) -> None:
    """From the third step on, checkpoints, the model and `result.json` cannot be written."""
    hung.patch(os, "fsync")
    if operation == "open":
        hung.patch(disk, "opener")

    class HangsInThirdStep(Lin):
        def loss(self, outputs: Any, targets: Any) -> Any:
            self.loss_calls = getattr(self, "loss_calls", 0) + 1
            if self.loss_calls == 3:
                hung.hangs.set()
            return super().loss(outputs, targets)

    with pytest.raises(StorageError, match="its disk does not answer") as raised:
        Trainer(fields(tmp_path, checkpoint={"every_steps": 3}), HangsInThirdStep).fit()
    assert raised.value.exit_code == 5 and "model.safetensors" in str(raised.value)
    assert not hung.timed_out


def test_creating_the_run_directory_has_a_deadline(hung: HungDisk, tmp_path: Path) -> None:
    hung.patch(Path, "mkdir")
    hung.hangs.set()
    with pytest.raises(StorageError, match=r"no answer within 0\.5 s"):
        Trainer(fields(tmp_path), Lin).fit()


@pytest.mark.parametrize("operation", ["iterdir", "_read_file"])
def test_resume_from_a_hung_disk_fails(
    operation: str, hung: HungDisk, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The disk hangs when the command lists the checkpoints, or when it reads one."""
    extra = {"task": "tasks_for_tests:Blobs", "checkpoint": {"every_steps": 2}}
    job = fields(tmp_path, **extra)
    first_run = Trainer(job, working_dir=TASKS).fit()
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**job, "steps": 8}))
    hung.patch(Path if operation == "iterdir" else checkpoints, operation)
    hung.hangs.set()
    arguments = ["submit", str(file), "--working-dir", str(TASKS), "--resume", str(first_run.path)]
    for flags in ([], ["--dry-run"]):
        assert command([*arguments, *flags]) == 5
        message = capfd.readouterr().err
        assert (
            f"{first_run.path}: no answer within {LIMIT_S:g} s: its disk does not answer" in message
        )
        assert "`failure.storage_timeout_s` changes this deadline" in message


def test_launch_fails_if_the_checkpoint_became_unreadable(hung: HungDisk, tmp_path: Path) -> None:
    """The checkpoint is checked against the job, and read again once the cluster has started."""
    extra = {"checkpoint": {"every_steps": 2}}
    first_run = Trainer(fields(tmp_path, **extra), Lin).fit()
    trainer = Trainer(fields(tmp_path, **{**extra, "steps": 8}), Lin, resume=first_run.path)
    launch: Any = SimpleNamespace(job=trainer.job, resumed=trainer._resumed)
    hung.patch(checkpoints, "_read_file")
    hung.hangs.set()
    with pytest.raises(StorageError, match=r"no answer within 0\.5 s"):
        newest_checkpoint(launch)


def test_reading_a_checkpoint_reports_progress_per_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline applies to each piece, not to the whole checkpoint."""
    monkeypatch.setattr(checkpoints, "_PIECE_BYTES", 10)
    path = Catalogue(tmp_path).write(1, {"a.safetensors": [b"x" * 95]}, {})
    calls: list[int] = []
    checkpoint = checkpoints.find(path, pytest.fail, lambda: calls.append(1))
    assert checkpoint.files["a.safetensors"] == b"x" * 95
    assert len(calls) > 10


def test_writing_a_checkpoint_reports_progress_per_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_PIECE_BYTES", 10)
    calls: list[int] = []
    catalogue = Catalogue(tmp_path, on_progress=lambda: calls.append(1))
    path = catalogue.write(1, {"a.safetensors": [b"x" * 45, b"", memoryview(b"y" * 50)]}, {})
    assert (path / "a.safetensors").read_bytes() == b"x" * 45 + b"y" * 50
    assert len(calls) >= 10


def test_file_of_small_parts_is_synced_as_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fsync of a whole checkpoint could take longer than the deadline."""
    monkeypatch.setattr(disk, "_PIECE_BYTES", 10)
    synced_sizes: list[int] = []
    real = os.fsync

    def fsync(file: int) -> None:
        if os.path.samestat(status := os.fstat(file), os.stat(tmp_path / "a")):
            synced_sizes.append(status.st_size)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    parts = disk.iter_pieces([b"x" * 4] * 6 + [b"y" * 25], lambda: None)
    assert disk.Disk().write(tmp_path / "a", parts)[0] == 49
    assert synced_sizes == [12, 24, 34, 44, 49]


@pytest.mark.parametrize("operation", ["mkdir", "open"])
def test_fetch_to_a_hung_disk_times_out(operation: str, hung: HungDisk, tmp_path: Path) -> None:
    url, target = upload_checkpoints(tmp_path, (1,)), tmp_path / "here"
    target.mkdir()
    hung.patch(Path, operation)
    hung.hangs.set()
    with pytest.raises(StorageError, match=r"here/step-000001.*: no answer within 0\.5 s"):
        fetch(url, target, LIMIT_S, pytest.fail)


def test_pruning_old_checkpoints_has_a_deadline(
    hung: HungDisk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hung.patch(Catalogue, "prune")

    class HangsAtFinish(Checkpoints):
        def finish(self) -> None:
            hung.hangs.set()
            super().finish()

    evaluation = {"evaluation": {"every_steps": 2}}
    best = {"every_steps": 2, "keep_best": {"metric": "loss", "mode": "min"}}

    class Evaluated(Lin):
        def eval_data(self) -> Any:
            return self.train_data()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distplat.actors.in_process.Checkpoints", HangsAtFinish)
        result = Trainer(fields(tmp_path, checkpoint=best, **evaluation), Evaluated).fit()
    assert result.checkpoint is not None
    assert not hung.timed_out
    assert "could not be deleted: " in caplog.text
    assert f"no answer within {LIMIT_S:g} s" in caplog.text


def test_role_files_on_a_hung_disk_do_not_block(hung: HungDisk, tmp_path: Path) -> None:
    """When a driver exits, Ray waits for the thread that prints the workers' lines."""
    hung.patch(RecordFile, "write")
    hung.hangs.set()
    messages: list[str] = []
    files = role_output.RoleFiles(tmp_path, messages.append)
    for number in range(3):
        files.write("worker-0", [f"line {number}"])
    files.close(LIMIT_S)
    assert not hung.timed_out
    assert messages == ["3 records of printed lines were not written"]


def test_upload_from_a_hung_disk_times_out(
    hung: HungDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distplat.platform.run_upload._LIST_S", LIMIT_S)
    (tmp_path / "run").mkdir()
    hung.patch(os, "walk")
    hung.hangs.set()
    messages: list[str] = []
    upload = upload_of(tmp_path / "run", f"file://{tmp_path}/there", LIMIT_S, messages.append)
    missing = upload.close()
    assert missing.startswith("the run directory not uploaded to file://")
    assert "its disk does not answer" in missing
