"""The driver's side: parts collected, written in a thread, errors of the disk; and whole runs."""

import errno
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damage import corrupt
from deliveries import Full, delivery, give, hasty
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

HERE = Path(__file__).parents[1] / "cluster"


def complete(*deliveries: Delivery, attempt: int = 0) -> tuple[list[int], list[int]]:
    """Versions that became complete, and those that never will."""
    collecting = CheckpointAssembly(2)
    collecting.begin(attempt)
    found = [parts[0].version for d in deliveries if (parts := collecting.add(d))]
    return found, collecting.skipped()


def test_a_version_is_complete_when_all_ranks_gave_it() -> None:
    assert complete(delivery(0, 5), delivery(0, 6), delivery(1, 5), delivery(1, 6)) == ([5, 6], [])
    assert complete(delivery(0, 5), delivery(1, 6)) == ([], [])
    assert complete(delivery(1, 5), delivery(1, 6), delivery(0, 6), delivery(0, 5)) == ([6], [5])
    assert complete(delivery(0, 5), delivery(1, 5, skipped=True)) == ([], [5])


def test_attempts_never_meet() -> None:
    mixed = [delivery(0, 5), delivery(1, 5, attempt=1), delivery(0, 5, attempt=1)]
    assert complete(*mixed, attempt=1) == ([5], [])
    assert complete(*mixed[:2], attempt=1) == ([], [])


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    checkpoint = {"every_steps": 1}
    job = job_of("ring", 2, optimizer={"name": "SGD", "lr": 1}, steps=9, checkpoint=checkpoint)
    return Launch(job, "run", Roles(), Policy(), None, "", None, tmp_path)


def test_parts_become_files(launch: Launch) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    give(checkpoints, 1, 2, 3)
    assert [saved.step for saved in checkpoints.take_finished()] == [1, 2, 3]
    assert checkpoints.take_finished() == []
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, checkpoints.step) == (3, 3)
    assert load_file(found.path / "model.safetensors")["w"].tolist() == [30, 31]
    assert load_file(found.path / "optimizer.safetensors") == {}
    assert Catalogue(launch.folder / "checkpoints").steps() == [2, 3]


def test_a_full_disk_is_warned_of_then_ends_the_run(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    disk = checkpoints._catalogue._disk = Full()
    give(checkpoints, *range(1, PATIENCE))
    assert checkpoints.take_finished() == []
    assert "no checkpoint of step 1 in" in caplog.text
    assert "No space left" in caplog.text
    disk.full = False
    give(checkpoints, 5)
    assert [saved.step for saved in checkpoints.take_finished()] == [5]
    disk.full = True
    give(checkpoints, 6, 7)
    assert checkpoints.take_finished() == [], "counted from the last that was written"
    give(checkpoints, 8)
    with pytest.raises(StorageError, match=r"3 checkpoints .*/checkpoints: step 8: No space"):
        checkpoints.take_finished()
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 5


def test_parameters_that_are_not_finite_are_no_checkpoint(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    """On whatever rank; the checkpoints before stay, and the newest of them is gone on from."""
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    give(checkpoints, 1, 2)
    for version in (3, 4):
        checkpoints.take(delivery(0, version))
        checkpoints.take(delivery(1, version, facts={NOT_FINITE: "0.weight"}))
        checkpoints.drain()
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 2
    assert "no checkpoint of step 4: '0.weight' holds NaN or infinity" in caplog.text
    assert checkpoints.take_finished(), "the disk is not to blame"


def test_a_part_that_was_lost_costs_one_checkpoint(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch(ref: Any) -> Any:
        if ref[0][0] == 21:
            raise ValueError("its owner died")
        return ref

    checkpoints = Checkpoints(launch, 2, fetch)
    give(checkpoints, 1, 2, 3, 4, 5)
    assert [saved.step for saved in checkpoints.take_finished()] == [1, 3, 4, 5]
    assert "no checkpoint of step 2: its owner died" in caplog.text


def test_every_checkpoint_that_fails_counts_whatever_the_cause(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(ref: Any) -> Any:
        if ref[0][0] > 30:
            raise ValueError("its owner died")
        return ref

    monkeypatch.setattr("distplat.actors.checkpointing._ONE_CAUSE_S", 0.0)
    checkpoints = Checkpoints(launch, 2, fetch)
    give(checkpoints, 1, 2, 3)
    checkpoints.take(delivery(0, 4))
    checkpoints.take(delivery(1, 4, skipped=True, failure="the object store is full"))
    assert len(checkpoints.take_finished()) == 2
    checkpoints.take(delivery(0, 5, facts={NOT_FINITE: "0.weight"}))
    checkpoints.take(delivery(1, 5))
    checkpoints.drain()
    with pytest.raises(StorageError, match=r"3 checkpoints .* step 5: '0.weight' holds NaN"):
        checkpoints.take_finished()


def test_a_part_that_does_not_come_in_time_names_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []

    def late(self: RayTransport, reference: object, timeout_s: float) -> None:
        waited.append(timeout_s)
        raise AnswerPending

    monkeypatch.setattr(RayTransport, "get", late)
    with pytest.raises(DeadlineExceeded, match=r"waited 7 s.*`failure\.step_timeout_s`"):
        controller_actor._fetch_arrays([None], limit_s=7.0)
    assert waited == [7.0]


def test_checkpoints_that_one_lost_worker_takes_along_count_as_one(launch: Launch) -> None:
    def fetch(ref: Any) -> Any:
        raise ValueError("its owner died")

    checkpoints = Checkpoints(launch, 2, fetch)
    give(checkpoints, 1, 2, 3, 4, 5)
    checkpoints.take(delivery(0, 6, attempt=9, skipped=True, failure="of another attempt"))
    assert checkpoints.take_finished() == []


def test_a_rollback_sets_damaged_checkpoints_aside(launch: Launch) -> None:
    """Else the damaged one is the newest, and what is written after the rollback is deleted."""
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    give(checkpoints, 4, 6)
    corrupt(checkpoints._catalogue.path(6))
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, checkpoints.step) == (4, 4)
    give(checkpoints, 5)
    assert [saved.step for saved in checkpoints.take_finished()] == [4, 6, 5]
    found = checkpoints.newest()
    assert found is not None and found.step == 5
    give(checkpoints, 6)
    found = checkpoints.newest()
    assert found is not None and found.step == 6


@pytest.mark.parametrize("fault", ["damaged", "unreadable", "gone"])
def test_a_rollback_never_begins_at_step_0_where_there_were_checkpoints(
    fault: str, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    assert checkpoints.newest() is None
    give(checkpoints, 1, 2)
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
    told = {"damaged": "all 2 checkpoints", "unreadable": "Stale file", "gone": "2 is gone, and"}
    with pytest.raises(StorageError, match=told[fault]):
        checkpoints.newest()


def test_a_resumed_run_goes_back_to_what_it_began_from(
    launch: Launch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Checkpoints(launch, 2, lambda ref: ref)
    give(first, 1)
    began_from = first._catalogue.path(1)
    resumed = replace(launch, resumed=began_from, folder=tmp_path / "resumed")
    resumed.folder.mkdir()
    checkpoints = Checkpoints(resumed, 2, lambda ref: ref)
    give(checkpoints, 2)
    corrupt(checkpoints._catalogue.path(2))
    found = checkpoints.newest()
    assert found is not None and found.path == began_from
    assert (
        "all 1 checkpoints are damaged; the rollback uses the checkpoint of --resume" in caplog.text
    )


def test_a_rollback_waits_for_a_slow_writer_and_nothing_is_deleted_while_it_reads(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, reading = threading.Event(), threading.Event()
    keep = launch.job.checkpoint.model_copy(update={"num_to_keep": 1})
    launch = replace(launch, job=launch.job.model_copy(update={"checkpoint": keep}))

    def slowly(ref: Any) -> Any:
        assert ref[0][0] < 20 or gate.wait(60)
        return ref

    checkpoints = Checkpoints(launch, 2, slowly)
    give(checkpoints, 1)
    monkeypatch.setattr(checkpoints, "_wait_for_writer", lambda limit_s: None)
    real = checkpoints._catalogue.newest

    def newest(warn: Any, moved: Any) -> Any:
        reading.set()
        gate.set()
        time.sleep(0.3)  # the writer is done with step 2 meanwhile, but for deleting step 1
        assert checkpoints._catalogue.path(1).is_dir()
        return real(warn, moved)

    monkeypatch.setattr(checkpoints._catalogue, "newest", newest)
    for rank in range(2):
        checkpoints.take(delivery(rank, 2))
    found = checkpoints.newest()
    assert found is not None
    checkpoints.drain()
    assert checkpoints._catalogue.steps() == [2]


def test_a_rollback_says_for_what_it_waits_and_goes_on_without_it(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("distplat.actors.checkpointing._SILENT_S", 0.01)
    # What is there is read in any time.
    monkeypatch.setattr("distplat.platform.disk.time", SimpleNamespace(monotonic=lambda: 0.0))
    gate = threading.Event()

    def slowly(ref: Any) -> Any:
        assert ref[0][0] < 20 or gate.wait(60)
        return ref

    checkpoints = Checkpoints(hasty(launch, 0.3), 2, slowly)
    give(checkpoints, 1)
    for rank in range(2):
        checkpoints.take(delivery(rank, 2))
    found = checkpoints.newest()
    gate.set()
    assert found is not None and found.step == 1
    assert "is being written, at most 0.3 s (`failure.storage_timeout_s`)" in caplog.text
    assert "still being written after 0.3 s (`failure.storage_timeout_s`)" in caplog.text


def test_a_disk_that_hangs_while_it_is_read_ends_the_run(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    checkpoints = Checkpoints(hasty(launch, 0.2), 2, lambda ref: ref)
    monkeypatch.setattr(checkpoints._catalogue, "newest", lambda *_: gate.wait(60))
    with pytest.raises(StorageError, match=r"within 0\.2 s: its disk does") as raised:
        checkpoints.newest()
    gate.set()
    assert "`failure.storage_timeout_s` changes this deadline" in str(raised.value)


def test_what_the_disk_cannot_keep_up_with_is_skipped(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()

    def slowly(ref: Any) -> Any:
        assert gate.wait(60)
        return ref

    checkpoints = Checkpoints(launch, 2, slowly)
    for version in range(1, 8):
        for rank in range(2):
            checkpoints.take(delivery(rank, version))
    gate.set()
    checkpoints.drain()
    told = [saved.step for saved in checkpoints.take_finished()]
    assert told[-2:] == [6, 7]
    assert len(told) <= 3
    assert caplog.text.count("checkpoints come faster than they are written") == 1


@pytest.mark.parametrize(("room", "skipped"), [(64 * 2**20, []), (0, [2, 3, 4, 5])])
def test_small_checkpoints_wait_for_a_slow_disk(
    room: int, skipped: list[int], launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distplat.actors.checkpointing._QUEUE_BYTES", room)
    keep = launch.job.checkpoint.model_copy(update={"num_to_keep": 9})
    launch = replace(launch, job=launch.job.model_copy(update={"checkpoint": keep}))
    gate, begun = threading.Event(), threading.Event()

    def slowly(ref: Any) -> Any:
        begun.set()
        assert gate.wait(60)
        return ref

    checkpoints = Checkpoints(launch, 2, slowly)
    for version in range(1, 8):
        for rank in range(2):
            checkpoints.take(delivery(rank, version))
        assert begun.wait(60)  # the first one is being written, and does not wait
    gate.set()
    checkpoints.drain()
    written = [saved.step for saved in checkpoints.take_finished()]
    assert written == [step for step in range(1, 8) if step not in skipped]


def test_old_ones_that_stay_end_no_run(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, while the upload of a copy reads them."""

    def busy(self: Disk, path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(Disk, "remove", busy)
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    for step in range(1, 8):
        give(checkpoints, step)
        assert [saved.step for saved in checkpoints.take_finished()] == [step]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "old checkpoints could not be deleted and take up space"
    ]


def test_what_a_rank_skips_is_said_once(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    for version in (1, 2):
        for rank in range(2):
            checkpoints.take(delivery(rank, version, skipped=rank == 1))
    text = "checkpoints come faster than they are written: step 1 is skipped"
    assert [record.message for record in caplog.records] == [text]
    assert checkpoints.take_finished() == []


def test_a_part_that_failed_is_not_said_to_come_too_fast(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    for rank in range(2):
        checkpoints.take(delivery(rank, 1, skipped=rank == 1, failure="a server is lost" * rank))
    assert not caplog.records
    for rank in range(2):
        checkpoints.take(delivery(rank, 2, skipped=rank == 1))
    assert [record.args for record in caplog.records] == [(2,)]
