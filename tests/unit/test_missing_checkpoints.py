"""Failures to write due checkpoints end a run."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deliveries import FullDisk, deliver, delivery, with_storage_timeout
from jobs import job_of

from distplat.actors.actor_group import Launch
from distplat.actors.checkpointing import Checkpoints, FailedCheckpoint, counted_failures
from distplat.actors.transport import ActorDied
from distplat.platform.checkpoints import Delivery
from distplat.platform.disk import Disk
from distplat.platform.errors import StorageError
from distplat.platform.recovery import Policy
from distplat.platform.resume import NOT_FINITE
from distplat.platform.tensor_slices import TensorEntry, TensorSlice
from distplat.strategies.strategy_spec import Roles


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    job = job_of("ring", 2, steps=9, checkpoint={"every_steps": 1})
    return Launch(job, "run", Roles(), Policy(), None, "", None, tmp_path)


def drain(checkpoints: Checkpoints) -> None:
    """Wait for the writer without the deadline of the run's disk."""
    with checkpoints._changed:
        assert checkpoints._changed.wait_for(checkpoints._idle, 60)


class HangingDisk(Disk):
    """Blocks each write until `proceed` is released; `blocked` counts the blocked writes."""

    def __init__(self) -> None:
        self.blocked, self.proceed = threading.Semaphore(0), threading.Semaphore(0)

    def write(self, path: Path, content: Any) -> tuple[int, str]:
        self.blocked.release()
        assert self.proceed.acquire(timeout=60)
        return super().write(path, content)


def checkpoints_on_hanging_disk(
    launch: Launch, now: list[float]
) -> tuple[Checkpoints, HangingDisk]:
    """Return checkpoints with a disk deadline of 5 s, and their disk; one write is in progress."""
    checkpoints = Checkpoints(with_storage_timeout(launch, 5.0), 2, lambda ref: ref, lambda: now[0])
    disk = checkpoints._catalogue._disk = HangingDisk()
    add(checkpoints, 1)
    assert disk.blocked.acquire(timeout=60)
    return checkpoints, disk


def add(checkpoints: Checkpoints, *versions: int, attempt: int = 0) -> None:
    for version in versions:
        for rank in range(2):
            checkpoints.take(delivery(rank, version, attempt))


@pytest.mark.parametrize("keep", [1, 9])
def test_hanging_disk_ends_the_run(
    keep: int, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints that wait for the disk count as failed, as skipped checkpoints do."""
    checkpoint_config = launch.job.checkpoint.model_copy(update={"num_to_keep": keep})
    launch = replace(launch, job=launch.job.model_copy(update={"checkpoint": checkpoint_config}))
    now = [0.0]
    checkpoints, disk = checkpoints_on_hanging_disk(launch, now)
    assert checkpoints.take_finished() == []
    now[0] = 5.0
    for _ in range(2):
        assert checkpoints.take_finished() == [], "one checkpoint has failed"
    (warning,) = [record.message for record in caplog.records]
    assert "checkpoints has accepted no data for 5 s (`failure.storage_timeout_s`)" in warning
    add(checkpoints, 2)
    assert checkpoints.take_finished() == [], "two checkpoints have failed"
    add(checkpoints, 3)
    with pytest.raises(
        StorageError, match=r"3 checkpoints .*: step 3: its disk has accepted no data"
    ):
        checkpoints.take_finished()
    disk.proceed.release(100)
    drain(checkpoints)
    assert checkpoints.take_finished(), "the disk works again"


def test_slow_disk_does_not_end_the_run(launch: Launch) -> None:
    """Each write takes nearly as long as the deadline, so most checkpoints are skipped."""
    now = [0.0]
    checkpoints, disk = checkpoints_on_hanging_disk(launch, now)
    for version in (2, 4, 6):  # a checkpoint has four files
        add(checkpoints, version, version + 1)
        now[0] += 4.0
        assert checkpoints.take_finished() == []
        disk.proceed.release()
        assert disk.blocked.acquire(timeout=60)
        assert checkpoints.take_finished() == []
    disk.proceed.release(100)
    drain(checkpoints)
    written = [saved.step for saved in checkpoints.take_finished()]
    assert written == [1, 6, 7], "the other checkpoints are skipped"


def test_slow_fetch_is_not_a_disk_failure(launch: Launch) -> None:
    now, started, gate = [0.0], threading.Event(), threading.Event()

    def slow_fetch(ref: Any) -> Any:
        started.set()
        assert gate.wait(60)
        return ref

    checkpoints = Checkpoints(with_storage_timeout(launch, 5.0), 2, slow_fetch, lambda: now[0])
    add(checkpoints, 1)
    assert started.wait(60)
    add(checkpoints, *range(2, 8))
    for _ in range(4):
        assert checkpoints.take_finished() == []
        now[0] += 100.0
    gate.set()
    drain(checkpoints)
    assert [saved.step for saved in checkpoints.take_finished()] == [1, 6, 7]


def test_failures_accumulate_over_attempts(launch: Launch) -> None:
    """The disk is full, and a worker is lost before each third checkpoint."""
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    checkpoints._catalogue._disk = FullDisk()
    deliver(checkpoints, 1, 2)
    checkpoints.begin(1, launch.job)
    assert checkpoints.take_finished() == []
    add(checkpoints, 2, attempt=1)  # the new attempt repeats the step
    drain(checkpoints)
    with pytest.raises(StorageError, match=r"3 checkpoints .* step 2: No space left"):
        checkpoints.take_finished()


def failed_at(time: float, lost_in: int | None = None, refused: bool = False) -> FailedCheckpoint:
    """Return a failed checkpoint whose step number equals its time."""
    return FailedCheckpoint(int(time), "why", time, refused, lost_in)


@pytest.mark.parametrize(
    ("failures", "counted"),
    [
        ([], []),
        ([failed_at(0, lost_in=1), failed_at(20, lost_in=1)], []),
        ([failed_at(0, lost_in=1), failed_at(20, lost_in=2)], [20]),
        ([failed_at(0, lost_in=2), failed_at(5, lost_in=2), failed_at(20, lost_in=2)], [0, 20]),
        ([failed_at(0, lost_in=1), failed_at(5)], [5]),
        ([failed_at(0), failed_at(20), failed_at(40)], [0, 20, 40]),
        ([failed_at(0), failed_at(9), failed_at(18)], [0, 18]),
        ([failed_at(0, refused=True), failed_at(1, refused=True)], [0, 1]),
        ([failed_at(0, refused=True), failed_at(1), failed_at(2, refused=True)], [0, 1, 2]),
    ],
)
def test_losses_of_earlier_attempts_do_not_count(
    failures: list[FailedCheckpoint], counted: list[int]
) -> None:
    """The current attempt is number 2. Failures without a loss count in any attempt."""
    assert [step for step, _ in counted_failures(failures, 2)] == counted


def test_one_loss_per_attempt_does_not_end_the_run(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt loses one part during its fetch, and one part before its delivery."""

    def fetch(ref: Any) -> Any:
        raise ActorDied("its node ended")

    monkeypatch.setattr("distplat.actors.checkpointing._ONE_CAUSE_S", 0.0)
    checkpoints = Checkpoints(launch, 2, fetch)
    for attempt in range(6):
        checkpoints.begin(attempt, launch.job)
        add(checkpoints, 1, attempt=attempt)
        drain(checkpoints)
        lost = {"skipped": True, "failure": "server-0 was lost", "lost": True}
        checkpoints.take(delivery(0, 2, attempt, **lost))
        assert checkpoints.take_finished() == []
    add(checkpoints, 3, attempt=5)  # without a new attempt
    drain(checkpoints)
    with pytest.raises(StorageError, match=r"3 checkpoints .* step 3: its node ended"):
        checkpoints.take_finished()


def test_failures_without_a_loss_accumulate_over_attempts(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank cannot deliver its part, or its part is not finite."""
    monkeypatch.setattr("distplat.actors.checkpointing._ONE_CAUSE_S", 0.0)
    checkpoints = Checkpoints(launch, 1, lambda ref: ref)
    checkpoints.take(delivery(0, 1, skipped=True, failure="the object store is full"))
    checkpoints.begin(1, launch.job)
    checkpoints.take(delivery(0, 2, 1, facts={NOT_FINITE: "0.weight"}))
    drain(checkpoints)
    checkpoints.begin(2, launch.job)
    assert checkpoints.take_finished() == []
    checkpoints.take(delivery(0, 3, 2, skipped=True, failure="the object store is full"))
    with pytest.raises(StorageError, match=r"3 checkpoints .* step 3: the object store is full"):
        checkpoints.take_finished()


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("embeddings-0/users/rows", np.nan, True),
        ("embeddings-1/users/rows", -np.inf, True),
        ("embeddings-0/users/rows", 3e38, False),
        ("embeddings-0/users/sum", np.inf, False),
        ("model/mask", -np.inf, False),
    ],
)
def test_checkpoint_with_non_finite_rows_is_rejected(
    key: str, value: float, refused: bool, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run cannot resume from non-finite rows. Optimizer state and buffers may be infinite."""
    entry = TensorEntry(key, TensorSlice((3, 2)), "float32", 0)
    values = np.array([1, 2, 3, 4, value, value], np.float32).view(np.uint8)
    checkpoints = Checkpoints(launch, 1, lambda ref: ref)
    checkpoints.take(Delivery(0, 0, 1, ([values],), ((entry,),)))
    drain(checkpoints)
    assert [saved.step for saved in checkpoints.take_finished()] == ([] if refused else [1])
    message = "no checkpoint of step 1: 'users' holds NaN or infinity; the checkpoints before stay"
    assert (message in caplog.text) is refused
