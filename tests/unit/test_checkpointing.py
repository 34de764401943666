"""Checkpoints on the driver: assembling parts, writing in a thread, and disk errors."""

import errno
import os
import shutil
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damage import corrupt
from deliveries import FullDisk, deliver, delivery, with_storage_timeout
from jobs import job_of
from safetensors.numpy import load_file

from distplat.actors import controller_actor
from distplat.actors.actor_group import Launch
from distplat.actors.checkpointing import PATIENCE, Checkpoints
from distplat.actors.ray_transport import RayTransport
from distplat.actors.transport import AnswerPending
from distplat.platform.checkpoints import Catalogue, CheckpointAssembly, Delivery
from distplat.platform.disk import Disk
from distplat.platform.errors import DeadlineExceeded, StorageError
from distplat.platform.recovery import Policy
from distplat.platform.resume import NOT_FINITE
from distplat.strategies.strategy_spec import Roles


def complete(*deliveries: Delivery, attempt: int = 0) -> tuple[list[int], list[int]]:
    """Return the complete versions and the skipped versions."""
    assembly = CheckpointAssembly(2)
    assembly.begin(attempt)
    versions = [parts[0].version for d in deliveries if (parts := assembly.add(d))]
    return versions, assembly.skipped()


def test_version_is_complete_after_the_parts_of_all_ranks() -> None:
    assert complete(delivery(0, 5), delivery(0, 6), delivery(1, 5), delivery(1, 6)) == ([5, 6], [])
    assert complete(delivery(0, 5), delivery(1, 6)) == ([], [])
    assert complete(delivery(1, 5), delivery(1, 6), delivery(0, 6), delivery(0, 5)) == ([6], [5])
    assert complete(delivery(0, 5), delivery(1, 5, skipped=True)) == ([], [5])


def test_ignores_parts_of_other_attempts() -> None:
    mixed = [delivery(0, 5), delivery(1, 5, attempt=1), delivery(0, 5, attempt=1)]
    assert complete(*mixed, attempt=1) == ([5], [])
    assert complete(*mixed[:2], attempt=1) == ([], [])


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    checkpoint = {"every_steps": 1}
    job = job_of("ring", 2, optimizer={"name": "SGD", "lr": 1}, steps=9, checkpoint=checkpoint)
    return Launch(job, "run", Roles(), Policy(), None, "", None, tmp_path)


def test_writes_parts_to_files(launch: Launch) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    deliver(checkpoints, 1, 2, 3)
    assert [saved.step for saved in checkpoints.take_finished()] == [1, 2, 3]
    assert checkpoints.take_finished() == []
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoints.step) == (3, 3)
    assert load_file(checkpoint.path / "model.safetensors")["w"].tolist() == [30, 31]
    assert load_file(checkpoint.path / "optimizer.safetensors") == {}
    assert Catalogue(launch.folder / "checkpoints").steps() == [2, 3]


def test_written_parts_are_released(launch: Launch) -> None:
    """Until the next checkpoint they would occupy Ray's object store."""
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    parts = [delivery(rank, 1) for rank in range(2)]
    arrays = [weakref.ref(array) for part in parts for (array,) in part.refs]
    while parts:
        checkpoints.take(parts.pop())
    checkpoints.drain()
    deadline = time.monotonic() + 30
    while any(array() is not None for array in arrays) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [array() for array in arrays] == [None, None]
    assert [saved.step for saved in checkpoints.take_finished()] == [1]


def test_full_disk_warns_first_and_then_ends_the_run(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    disk = checkpoints._catalogue._disk = FullDisk()
    deliver(checkpoints, *range(1, PATIENCE))
    assert checkpoints.take_finished() == []
    assert "no checkpoint of step 1 in" in caplog.text
    assert "No space left" in caplog.text
    disk.full = False
    deliver(checkpoints, 5)
    assert [saved.step for saved in checkpoints.take_finished()] == [5]
    disk.full = True
    deliver(checkpoints, 6, 7)
    assert checkpoints.take_finished() == [], (
        "failures are counted since the last written checkpoint"
    )
    deliver(checkpoints, 8)
    with pytest.raises(StorageError, match=r"3 checkpoints .*/checkpoints: step 8: No space"):
        checkpoints.take_finished()
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    assert checkpoint.step == 5


def test_does_not_save_parameters_that_are_not_finite(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    """On any rank; earlier checkpoints stay, and a rollback restores the newest of them."""
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    deliver(checkpoints, 1, 2)
    for version in (3, 4):
        checkpoints.take(delivery(0, version))
        checkpoints.take(delivery(1, version, facts={NOT_FINITE: "0.weight"}))
        checkpoints.drain()
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 2
    assert "no checkpoint of step 4: '0.weight' holds NaN or infinity" in caplog.text
    assert checkpoints.take_finished(), "not a disk error"


def test_lost_part_skips_one_checkpoint(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    def fetch(ref: Any) -> Any:
        if ref[0][0] == 21:
            raise ValueError("its owner died")
        return ref

    checkpoints = Checkpoints(launch, 2, fetch)
    deliver(checkpoints, 1, 2, 3, 4, 5)
    assert [saved.step for saved in checkpoints.take_finished()] == [1, 3, 4, 5]
    assert "no checkpoint of step 2: its owner died" in caplog.text


def test_counts_failures_of_every_cause(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(ref: Any) -> Any:
        if ref[0][0] > 30:
            raise ValueError("its owner died")
        return ref

    monkeypatch.setattr("distplat.actors.checkpointing._ONE_CAUSE_S", 0.0)
    checkpoints = Checkpoints(launch, 2, fetch)
    deliver(checkpoints, 1, 2, 3)
    checkpoints.take(delivery(0, 4))
    checkpoints.take(delivery(1, 4, skipped=True, failure="the object store is full"))
    assert len(checkpoints.take_finished()) == 2
    checkpoints.take(delivery(0, 5, facts={NOT_FINITE: "0.weight"}))
    checkpoints.take(delivery(1, 5))
    checkpoints.drain()
    with pytest.raises(StorageError, match=r"3 checkpoints .* step 5: '0.weight' holds NaN"):
        checkpoints.take_finished()


def test_late_part_error_names_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeouts: list[float] = []

    def late(self: RayTransport, reference: object, timeout_s: float) -> None:
        timeouts.append(timeout_s)
        raise AnswerPending

    monkeypatch.setattr(RayTransport, "get", late)
    with pytest.raises(DeadlineExceeded, match=r"waited 7 s.*`failure\.step_timeout_s`"):
        controller_actor._fetch_arrays([None], limit_s=7.0)
    assert timeouts == [7.0]


def test_failures_of_one_lost_worker_count_once(launch: Launch) -> None:
    def fetch(ref: Any) -> Any:
        raise ValueError("its owner died")

    checkpoints = Checkpoints(launch, 2, fetch)
    deliver(checkpoints, 1, 2, 3, 4, 5)
    checkpoints.take(delivery(0, 6, attempt=9, skipped=True, failure="of another attempt"))
    assert checkpoints.take_finished() == []


def test_rollback_sets_damaged_checkpoints_aside(launch: Launch) -> None:
    """A damaged checkpoint that stays the newest would cause the deletion of later ones."""
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    deliver(checkpoints, 4, 6)
    corrupt(checkpoints._catalogue.path(6))
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoints.step) == (4, 4)
    deliver(checkpoints, 5)
    assert [saved.step for saved in checkpoints.take_finished()] == [4, 6, 5]
    checkpoint = checkpoints.newest()
    assert checkpoint is not None and checkpoint.step == 5
    deliver(checkpoints, 6)
    checkpoint = checkpoints.newest()
    assert checkpoint is not None and checkpoint.step == 6


@pytest.mark.parametrize("fault", ["damaged", "unreadable", "gone"])
def test_rollback_never_restarts_at_step_0_if_checkpoints_existed(
    fault: str, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    assert checkpoints.newest() is None
    deliver(checkpoints, 1, 2)
    catalogue = checkpoints._catalogue
    if fault == "damaged":
        for step in catalogue.steps():
            corrupt(catalogue.path(step))
    elif fault == "unreadable":

        def refuse(path: object) -> Any:
            raise OSError(errno.ESTALE, "Stale file handle")

        monkeypatch.setattr(Path, "iterdir", refuse)
    else:
        shutil.rmtree(catalogue.folder)
    messages = {
        "damaged": "all 2 checkpoints",
        "unreadable": "Stale file",
        "gone": "2 is gone, and",
    }
    with pytest.raises(StorageError, match=messages[fault]):
        checkpoints.newest()


def test_resumed_run_rolls_back_to_its_initial_checkpoint(
    launch: Launch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Checkpoints(launch, 2, lambda ref: ref)
    deliver(first, 1)
    initial = first._catalogue.path(1)
    resumed = replace(launch, resumed=initial, folder=tmp_path / "resumed")
    resumed.folder.mkdir()
    checkpoints = Checkpoints(resumed, 2, lambda ref: ref)
    deliver(checkpoints, 2)
    corrupt(checkpoints._catalogue.path(2))
    checkpoint = checkpoints.newest()
    assert checkpoint is not None and checkpoint.path == initial
    assert (
        "all 1 checkpoints are damaged; the rollback uses the checkpoint of --resume" in caplog.text
    )


def test_rollback_reads_while_no_checkpoint_is_deleted(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    keep = launch.job.checkpoint.model_copy(update={"num_to_keep": 1})
    launch = replace(launch, job=launch.job.model_copy(update={"checkpoint": keep}))

    def fetch(ref: Any) -> Any:
        assert ref[0][0] < 20 or gate.wait(60)
        return ref

    checkpoints = Checkpoints(launch, 2, fetch)
    deliver(checkpoints, 1)
    monkeypatch.setattr(checkpoints, "_wait_for_writer", lambda limit_s: None)
    original = checkpoints._catalogue.newest

    def newest(warn: Any, moved: Any) -> Any:
        gate.set()
        until = time.monotonic() + 30.0
        while not checkpoints._catalogue.path(2).is_dir():
            assert time.monotonic() < until, "the writer does not finish step 2"
            time.sleep(0.01)
        time.sleep(0.1)  # now the writer would delete step 1
        assert checkpoints._catalogue.path(1).is_dir()
        return original(warn, moved)

    monkeypatch.setattr(checkpoints._catalogue, "newest", newest)
    for rank in range(2):
        checkpoints.take(delivery(rank, 2))
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    checkpoints.drain()
    assert checkpoints._catalogue.steps() == [2]


def test_rollback_waits_for_the_writer_until_a_deadline(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("distplat.actors.checkpointing._SILENT_S", 0.01)
    # Reading has no deadline here.
    monkeypatch.setattr("distplat.platform.disk.time", SimpleNamespace(monotonic=lambda: 0.0))
    gate = threading.Event()

    def fetch(ref: Any) -> Any:
        assert ref[0][0] < 20 or gate.wait(60)
        return ref

    checkpoints = Checkpoints(with_storage_timeout(launch, 0.3), 2, fetch)
    deliver(checkpoints, 1)
    for rank in range(2):
        checkpoints.take(delivery(rank, 2))
    checkpoint = checkpoints.newest()
    gate.set()
    assert checkpoint is not None and checkpoint.step == 1
    assert "is being written, at most 0.3 s (`failure.storage_timeout_s`)" in caplog.text
    assert "still being written after 0.3 s (`failure.storage_timeout_s`)" in caplog.text


def test_hanging_read_ends_the_run(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    checkpoints = Checkpoints(with_storage_timeout(launch, 0.2), 2, lambda ref: ref)
    monkeypatch.setattr(checkpoints._catalogue, "newest", lambda *_: gate.wait(60))
    with pytest.raises(StorageError, match=r"within 0\.2 s: its disk does") as raised:
        checkpoints.newest()
    gate.set()
    assert "`failure.storage_timeout_s` changes this deadline" in str(raised.value)


def test_skips_checkpoints_if_the_disk_is_too_slow(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()

    def fetch(ref: Any) -> Any:
        assert gate.wait(60)
        return ref

    checkpoints = Checkpoints(launch, 2, fetch)
    for version in range(1, 8):
        for rank in range(2):
            checkpoints.take(delivery(rank, version))
    gate.set()
    checkpoints.drain()
    steps = [saved.step for saved in checkpoints.take_finished()]
    assert steps[-2:] == [6, 7]
    assert len(steps) <= 3
    assert caplog.text.count("checkpoints come faster than they are written") == 1


@pytest.mark.parametrize(("queue_bytes", "skipped"), [(64 * 2**20, []), (0, [2, 3, 4, 5])])
def test_queues_small_checkpoints_for_a_slow_disk(
    queue_bytes: int, skipped: list[int], launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distplat.actors.checkpointing._QUEUE_BYTES", queue_bytes)
    keep = launch.job.checkpoint.model_copy(update={"num_to_keep": 9})
    launch = replace(launch, job=launch.job.model_copy(update={"checkpoint": keep}))
    gate, started = threading.Event(), threading.Event()

    def fetch(ref: Any) -> Any:
        started.set()
        assert gate.wait(60)
        return ref

    checkpoints = Checkpoints(launch, 2, fetch)
    for version in range(1, 8):
        for rank in range(2):
            checkpoints.take(delivery(rank, version))
        assert started.wait(60)  # the first checkpoint is being written, outside the queue
    gate.set()
    checkpoints.drain()
    written = [saved.step for saved in checkpoints.take_finished()]
    assert written == [step for step in range(1, 8) if step not in skipped]


def test_failed_deletion_only_warns(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS a deletion fails while another process reads the file."""

    def busy(self: Disk, path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(Disk, "remove", busy)
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    for step in range(1, 8):
        deliver(checkpoints, step)
        assert [saved.step for saved in checkpoints.take_finished()] == [step]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "old checkpoints could not be deleted and take up space"
    ]


def test_warns_once_of_skipped_parts(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    for version in (1, 2):
        for rank in range(2):
            checkpoints.take(delivery(rank, version, skipped=rank == 1))
    text = "checkpoints come faster than they are written: step 1 is skipped"
    assert [record.message for record in caplog.records] == [text]
    assert checkpoints.take_finished() == []


def test_failed_part_is_not_reported_as_too_fast(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    for rank in range(2):
        checkpoints.take(delivery(rank, 1, skipped=rank == 1, failure="a server is lost" * rank))
    assert not caplog.records
    for rank in range(2):
        checkpoints.take(delivery(rank, 2, skipped=rank == 1))
    assert [record.args for record in caplog.records] == [(2,)]
