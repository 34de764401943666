"""A disk that gives no answer: runs go on, and end within `failure.storage_timeout_s`."""

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
from uploads import TASKS, uploaded

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
_HELD_S = 90.0
"""How long an operation is held that the test does not release; less than a test may take."""


class Hung:
    """
    Operations of this process that wait until the test is over, once `at` is set.

    The clock of `with_deadline` stands until one of them does: on a busy machine healthy ones take
    their time, too.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at, self._over, self._patch = threading.Event(), threading.Event(), patch
        self.ended = (
            False  #: an operation was held for `_HELD_S`, so somebody may have waited for it
        )
        self._since: float | None = None
        self.sleep = time.sleep
        patch.setattr(disk, "time", self)

    def monotonic(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    def patch(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def work(*args: Any, **more: Any) -> Any:
            if self.at.is_set():
                self._since = self._since or time.monotonic()
                self.ended = not self._over.wait(_HELD_S) or self.ended
                raise OSError("held until after the test")
            return real(*args, **more)

        self._patch.setattr(owner, name, work)

    def end(self) -> None:
        self._over.set()


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hung]:
    found = Hung(monkeypatch)
    yield found
    found.end()


class Clock:
    """Seconds as a test says."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_who_moves_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(disk, "time", clock)

    def work(moved: OnProgress) -> str:
        for _ in range(6):
            clock.now += LIMIT_S / 2
            moved()
        return "done"

    assert with_deadline(work, Path("/there"), LIMIT_S) == "done"
    over = threading.Event()

    def hang(moved: OnProgress) -> None:
        clock.now += 2 * LIMIT_S
        assert over.wait(60)

    with pytest.raises(StorageError, match=rf"^/there: no answer within {LIMIT_S} s") as raised:
        with_deadline(hang, Path("/there"), LIMIT_S)
    with pytest.raises(StorageError, match=r"its disk does not answer$"):
        with_deadline(hang, Path("/there"), LIMIT_S, setting="")
    over.set()
    assert "`failure.storage_timeout_s` changes this deadline" in str(raised.value)
    with pytest.raises(KeyError, match="'a'"):
        with_deadline(lambda moved: os.environ["a"], Path("/there"), LIMIT_S)


def test_a_large_file_moves_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_PIECE_BYTES", 10)
    moves: list[int] = []
    write_atomically(tmp_path / "a", b"x" * 25, lambda: moves.append(1))
    assert (tmp_path / "a").read_bytes() == b"x" * 25
    assert len(moves) == 3


def fields(folder: Path, **more: Any) -> dict[str, Any]:
    failure = {"storage_timeout_s": LIMIT_S}
    job = fields_of("ring", 0, epochs=None, steps=6, global_batch_size=16, failure=failure)
    return {**job, "storage_path": str(folder), **more}


@pytest.mark.parametrize("operation", ["fsync", "open"])
def test_a_run_whose_disk_hangs_ends_with_its_cause(
    operation: str, hung: Hung, tmp_path: Path
) -> None:
    """From the third step on: checkpoints, the model and `result.json` do not come to the disk."""
    hung.patch(os, "fsync")
    if operation == "open":
        hung.patch(disk, "opener")

    class Third(Lin):
        def loss(self, outputs: Any, targets: Any) -> Any:
            self.made = getattr(self, "made", 0) + 1
            if self.made == 3:
                hung.at.set()
            return super().loss(outputs, targets)

    with pytest.raises(StorageError, match="its disk does not answer") as raised:
        Trainer(fields(tmp_path, checkpoint={"every_steps": 3}), Third).fit()
    assert raised.value.exit_code == 5 and "model.safetensors" in str(raised.value)
    assert not hung.ended


def test_a_run_directory_that_cannot_be_made_is_not_waited_for(hung: Hung, tmp_path: Path) -> None:
    hung.patch(Path, "mkdir")
    hung.at.set()
    with pytest.raises(StorageError, match=r"no answer within 0\.5 s"):
        Trainer(fields(tmp_path), Lin).fit()


@pytest.mark.parametrize("operation", ["iterdir", "_read_file"])
def test_a_run_goes_on_from_no_disk_that_hangs(
    operation: str, hung: Hung, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It hangs when the command looks for checkpoints, or when it reads one."""
    more = {"task": "tasks_for_tests:Blobs", "checkpoint": {"every_steps": 2}}
    job = fields(tmp_path, **more)
    whole = Trainer(job, working_dir=TASKS).fit()
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**job, "steps": 8}))
    hung.patch(Path if operation == "iterdir" else checkpoints, operation)
    hung.at.set()
    line = ["submit", str(file), "--working-dir", str(TASKS), "--resume", str(whole.path)]
    for further in ([], ["--dry-run"]):
        assert command([*line, *further]) == 5
        told = capfd.readouterr().err
        assert f"{whole.path}: no answer within {LIMIT_S:g} s: its disk does not answer" in told
        assert "`failure.storage_timeout_s` changes this deadline" in told


def test_who_begins_from_a_disk_that_hangs_later_is_told(hung: Hung, tmp_path: Path) -> None:
    """It has been compared with the job, and is read once more when the cluster is there."""
    more = {"checkpoint": {"every_steps": 2}}
    whole = Trainer(fields(tmp_path, **more), Lin).fit()
    trainer = Trainer(fields(tmp_path, **{**more, "steps": 8}), Lin, resume=whole.path)
    launch: Any = SimpleNamespace(job=trainer.job, resumed=trainer._resumed)
    hung.patch(checkpoints, "_read_file")
    hung.at.set()
    with pytest.raises(StorageError, match=r"no answer within 0\.5 s"):
        newest_checkpoint(launch)


def test_a_large_checkpoint_is_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk is given its time for each piece, not for all of a checkpoint."""
    monkeypatch.setattr(checkpoints, "_PIECE_BYTES", 10)
    path = Catalogue(tmp_path).write(1, {"a.safetensors": [b"x" * 95]}, {})
    moves: list[int] = []
    found = checkpoints.find(path, pytest.fail, lambda: moves.append(1))
    assert found.files["a.safetensors"] == b"x" * 95
    assert len(moves) > 10


def test_a_large_checkpoint_is_written_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_PIECE_BYTES", 10)
    moves: list[int] = []
    catalogue = Catalogue(tmp_path, on_progress=lambda: moves.append(1))
    path = catalogue.write(1, {"a.safetensors": [b"x" * 45, b"", memoryview(b"y" * 50)]}, {})
    assert (path / "a.safetensors").read_bytes() == b"x" * 45 + b"y" * 50
    assert len(moves) >= 10


def test_a_large_file_of_small_parts_is_synced_as_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk is to show that it moves: all of a checkpoint in one sync takes longer than it may."""
    monkeypatch.setattr(disk, "_PIECE_BYTES", 10)
    synced: list[int] = []
    real = os.fsync

    def fsync(file: int) -> None:
        if os.path.samestat(status := os.fstat(file), os.stat(tmp_path / "a")):
            synced.append(status.st_size)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    parts = disk.iter_pieces([b"x" * 4] * 6 + [b"y" * 25], lambda: None)
    assert disk.Disk().write(tmp_path / "a", parts)[0] == 49
    assert synced == [12, 24, 34, 44, 49]


@pytest.mark.parametrize("operation", ["mkdir", "open"])
def test_what_comes_from_a_url_waits_for_no_local_disk(
    operation: str, hung: Hung, tmp_path: Path
) -> None:
    url, target = uploaded(tmp_path, (1,)), tmp_path / "here"
    target.mkdir()
    hung.patch(Path, operation)
    hung.at.set()
    with pytest.raises(StorageError, match=r"here/step-000001.*: no answer within 0\.5 s"):
        fetch(url, target, LIMIT_S, pytest.fail)


def test_old_checkpoints_that_cannot_be_deleted_are_not_waited_for(
    hung: Hung, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hung.patch(Catalogue, "prune")

    class Settling(Checkpoints):
        def finish(self) -> None:
            hung.at.set()
            super().finish()

    evaluated = {"evaluation": {"every_steps": 2}}
    best = {"every_steps": 2, "keep_best": {"metric": "loss", "mode": "min"}}

    class Evaluated(Lin):
        def eval_data(self) -> Any:
            return self.train_data()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distplat.actors.in_process.Checkpoints", Settling)
        result = Trainer(fields(tmp_path, checkpoint=best, **evaluated), Evaluated).fit()
    assert result.checkpoint is not None
    assert "could not be deleted: " in caplog.text


def test_lines_of_workers_hold_nobody_up(hung: Hung, tmp_path: Path) -> None:
    """Ray waits for the thread that prints them when a driver ends."""
    hung.patch(RecordFile, "write")
    hung.at.set()
    said: list[str] = []
    files = role_output.RoleFiles(tmp_path, said.append)
    for number in range(3):
        files.write("worker-0", [f"line {number}"])
    files.close(LIMIT_S)
    assert not hung.ended
    assert said == ["3 records of printed lines were not written"]


def test_an_upload_from_a_disk_that_hangs_is_given_up(
    hung: Hung, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distplat.platform.run_upload._LIST_S", LIMIT_S)
    (tmp_path / "run").mkdir()
    hung.patch(os, "walk")
    hung.at.set()
    said: list[str] = []
    upload = upload_of(tmp_path / "run", f"file://{tmp_path}/there", LIMIT_S, said.append)
    missing = upload.close()
    assert missing.startswith("the run directory not uploaded to file://")
    assert "its disk does not answer" in missing
