"""Checkpoints that are due and do not come: they end a run, whatever the cause."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deliveries import Full, delivery, give, hasty
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
    """Wait for the writer, however short the deadline of the run's disk."""
    with checkpoints._changed:
        assert checkpoints._changed.wait_for(checkpoints._idle, 60)


class Hanging(Disk):
    """Begins no write before it may; `begun` counts those that wait for that."""

    def __init__(self) -> None:
        self.begun, self.may = threading.Semaphore(0), threading.Semaphore(0)

    def write(self, path: Path, content: Any) -> tuple[int, str]:
        self.begun.release()
        assert self.may.acquire(timeout=60)
        return super().write(path, content)


def on_a_hanging_disk(launch: Launch, now: list[float]) -> tuple[Checkpoints, Hanging]:
    """A run's checkpoints on such a disk, with a deadline of 5 s; the first is under way."""
    checkpoints = Checkpoints(hasty(launch, 5.0), 2, lambda ref: ref, lambda: now[0])
    disk = checkpoints._catalogue._disk = Hanging()
    add(checkpoints, 1)
    assert disk.begun.acquire(timeout=60)
    return checkpoints, disk


def add(checkpoints: Checkpoints, *versions: int, attempt: int = 0) -> None:
    for version in versions:
        for rank in range(2):
            checkpoints.take(delivery(rank, version, attempt))


@pytest.mark.parametrize("keep", [1, 9])
def test_a_disk_that_hangs_ends_the_run(
    keep: int, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that wait for it count, and so do those that are skipped."""
    fewer = launch.job.checkpoint.model_copy(update={"num_to_keep": keep})
    launch = replace(launch, job=launch.job.model_copy(update={"checkpoint": fewer}))
    now = [0.0]
    checkpoints, disk = on_a_hanging_disk(launch, now)
    assert checkpoints.take_finished() == []
    now[0] = 5.0
    for _ in range(2):
        assert checkpoints.take_finished() == [], "one is missing"
    (said,) = [record.message for record in caplog.records]
    assert "checkpoints has accepted no data for 5 s (`failure.storage_timeout_s`)" in said
    add(checkpoints, 2)
    assert checkpoints.take_finished() == [], "two are"
    add(checkpoints, 3)
    with pytest.raises(
        StorageError, match=r"3 checkpoints .*: step 3: its disk has accepted no data"
    ):
        checkpoints.take_finished()
    disk.may.release(100)
    drain(checkpoints)
    assert checkpoints.take_finished(), "it answers again"


def test_a_disk_that_is_slow_ends_no_run(launch: Launch) -> None:
    """Each of a checkpoint's files takes nearly as long as may pass, and most are skipped."""
    now = [0.0]
    checkpoints, disk = on_a_hanging_disk(launch, now)
    for version in (2, 4, 6):  # of its files there are four
        add(checkpoints, version, version + 1)
        now[0] += 4.0
        assert checkpoints.take_finished() == []
        disk.may.release()
        assert disk.begun.acquire(timeout=60)
        assert checkpoints.take_finished() == []
    disk.may.release(100)
    drain(checkpoints)
    written = [saved.step for saved in checkpoints.take_finished()]
    assert written == [1, 6, 7], "the others came too fast"


def test_a_part_that_takes_long_to_come_is_not_the_disks_fault(launch: Launch) -> None:
    now, begun, gate = [0.0], threading.Event(), threading.Event()

    def slowly(ref: Any) -> Any:
        begun.set()
        assert gate.wait(60)
        return ref

    checkpoints = Checkpoints(hasty(launch, 5.0), 2, slowly, lambda: now[0])
    add(checkpoints, 1)
    assert begun.wait(60)
    add(checkpoints, *range(2, 8))
    for _ in range(4):
        assert checkpoints.take_finished() == []
        now[0] += 100.0
    gate.set()
    drain(checkpoints)
    assert [saved.step for saved in checkpoints.take_finished()] == [1, 6, 7]


def test_failures_count_over_restarts(launch: Launch) -> None:
    """A disk that is full, and a worker that is lost before each third checkpoint."""
    checkpoints = Checkpoints(launch, 2, lambda ref: ref)
    checkpoints._catalogue._disk = Full()
    give(checkpoints, 1, 2)
    checkpoints.begin(1, launch.job)
    assert checkpoints.take_finished() == []
    add(checkpoints, 2, attempt=1)  # the same step once more, for all went back
    drain(checkpoints)
    with pytest.raises(StorageError, match=r"3 checkpoints .* step 2: No space left"):
        checkpoints.take_finished()


def failed(at: float, lost_in: int | None = None, refused: bool = False) -> FailedCheckpoint:
    """One whose step says when it failed."""
    return FailedCheckpoint(int(at), "why", at, refused, lost_in)


@pytest.mark.parametrize(
    ("failures", "counted"),
    [
        ([], []),
        ([failed(0, lost_in=1), failed(20, lost_in=1)], []),
        ([failed(0, lost_in=1), failed(20, lost_in=2)], [20]),
        ([failed(0, lost_in=2), failed(5, lost_in=2), failed(20, lost_in=2)], [0, 20]),
        ([failed(0, lost_in=1), failed(5)], [5]),
        ([failed(0), failed(20), failed(40)], [0, 20, 40]),
        ([failed(0), failed(9), failed(18)], [0, 18]),
        ([failed(0, refused=True), failed(1, refused=True)], [0, 1]),
        ([failed(0, refused=True), failed(1), failed(2, refused=True)], [0, 1, 2]),
    ],
)
def test_a_loss_counts_in_its_attempt_alone(
    failures: list[FailedCheckpoint], counted: list[int]
) -> None:
    """The attempt last begun is number 2. All else counts, whatever began since."""
    assert [step for step, _ in counted_failures(failures, 2)] == counted


def test_workers_that_are_lost_with_their_parts_end_no_run(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in each attempt, on the disk's side and on that of the rank that gives its part."""

    def fetch(ref: Any) -> Any:
        raise ActorDied("its node ended")

    monkeypatch.setattr("distplat.actors.checkpointing._ONE_CAUSE_S", 0.0)
    checkpoints = Checkpoints(launch, 2, fetch)
    for attempt in range(6):
        checkpoints.begin(attempt, launch.job)
        add(checkpoints, 1, attempt=attempt)
        drain(checkpoints)
        told = {"skipped": True, "failure": "server-0 was lost", "lost": True}
        checkpoints.take(delivery(0, 2, attempt, **told))
        assert checkpoints.take_finished() == []
    add(checkpoints, 3, attempt=5)  # and no attempt begins
    drain(checkpoints)
    with pytest.raises(StorageError, match=r"3 checkpoints .* step 3: its node ended"):
        checkpoints.take_finished()


def test_failures_that_are_no_loss_count_over_restarts(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a rank could not give its part, or what it gave is not finite."""
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
def test_tables_that_are_not_finite_are_no_checkpoint(
    key: str, value: float, refused: bool, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose rows are not: a run could not go on from them. A buffer may well be infinite."""
    entry = TensorEntry(key, TensorSlice((3, 2)), "float32", 0)
    values = np.array([1, 2, 3, 4, value, value], np.float32).view(np.uint8)
    checkpoints = Checkpoints(launch, 1, lambda ref: ref)
    checkpoints.take(Delivery(0, 0, 1, ([values],), ((entry,),)))
    drain(checkpoints)
    assert [saved.step for saved in checkpoints.take_finished()] == ([] if refused else [1])
    told = "no checkpoint of step 1: 'users' holds NaN or infinity; the checkpoints before stay"
    assert (told in caplog.text) is refused
