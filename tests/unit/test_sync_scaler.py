"""Resizing without Ray: start and end of new workers, answers, due resizes."""

from collections.abc import Callable
from typing import cast

import pytest
import ray
from jobs import job_of

from distplat.actors import resizing
from distplat.actors.actor_group import ActorGroup
from distplat.actors.resizing import SyncScaler
from distplat.platform.errors import UserCodeError
from distplat.platform.scaling import ScaleRequest, ScaleRequests, ScaleStatus

JOB = job_of(
    {"name": "ps-sync", "backup_workers": 1},
    2,
    global_batch_size=8,
    failure={"start_timeout_s": 7},
)


class FakeActorGroup:
    """Two workers; `newcomers` maps ranks to the outcome of their start, None while pending."""

    def __init__(self) -> None:
        self.job, self.requests = JOB, ScaleRequests()
        self.newcomers: dict[int, object] = {}

    @property
    def world(self) -> int:
        return self.job.scaling.world

    def start_newcomer(self, rank: int, checkpoint_step: int) -> Callable[[], int]:
        assert rank not in self.newcomers

        def call() -> int:
            self.newcomers[rank] = None
            return rank

        return call

    def end_newcomer(self, rank: int) -> None:
        del self.newcomers[rank]

    def resize(self, world: int) -> None:
        for rank in range(self.world, world):
            assert self.newcomers.pop(rank) == "ready"
        self.job = self.job.with_workers(world)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def missing_resources() -> list[str]:
    """Resources that the cluster lacks."""
    return []


@pytest.fixture
def actor_group(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, missing_resources: list[str]
) -> FakeActorGroup:
    fake = FakeActorGroup()

    def wait(calls: list[int], timeout: float) -> tuple[list[int], list[int]]:
        done = [rank for rank in calls if fake.newcomers[rank] is not None]
        return done, [rank for rank in calls if rank not in done]

    def get(rank: int, timeout: float) -> None:
        outcome = fake.newcomers[rank]
        if isinstance(outcome, Exception):
            raise outcome

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(resizing, "time", clock)
    monkeypatch.setattr(resizing, "lacks", lambda job, more: "".join(missing_resources))
    return fake


def submit_request(actor_group: FakeActorGroup, workers: int) -> SyncScaler:
    scaler = SyncScaler(cast(ActorGroup, actor_group), actor_group.requests)
    actor_group.requests.submit(workers)
    assert scaler.advance(0) is None
    return scaler


def test_resize_waits_until_new_workers_are_ready(actor_group: FakeActorGroup) -> None:
    scaler = submit_request(actor_group, 4)
    assert actor_group.newcomers == {2: None, 3: None}
    actor_group.newcomers[3] = "ready"
    assert scaler.advance(0) is None
    actor_group.newcomers[2] = "ready"
    assert scaler.advance(0) == 4
    assert scaler.advance(0) == 4, "due until the resize"
    assert actor_group.requests.status().pending
    actor_group.resize(4)
    scaler.resized()
    assert (scaler.advance(0), scaler.world) == (None, 4)
    assert actor_group.requests.status() == ScaleStatus(ScaleRequest(1, 4))
    assert scaler.advance(0) is None


@pytest.mark.parametrize("lost", [2, 3])
@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (ray.exceptions.RayActorError(), "the actor experienced an error"),
        (
            ray.exceptions.RayTaskError(
                "f", "", UserCodeError(3, None, "KeyError: 17", "Trace\n  x", "try y")
            ),
            "your task failed on rank 3, before the first step: keyerror: 17",
        ),
        (None, "it was not ready within `failure.start_timeout_s`, 7 s"),
    ],
    ids=["killed", "it raised", "too slow"],
)
def test_failed_start_of_one_worker_ends_all_new_workers(
    actor_group: FakeActorGroup, clock: Clock, lost: int, outcome: object, reason: str
) -> None:
    scaler = submit_request(actor_group, 4)
    actor_group.newcomers |= {lost: outcome, 5 - lost: "ready" if lost == 3 else None}
    clock.now = 7.1
    assert scaler.advance(0) is None
    assert actor_group.newcomers == {}
    status = actor_group.requests.status()
    assert (status.request, status.pending) == (ScaleRequest(1, 4), False)
    refusal = status.refused
    assert refusal.startswith(f"worker-{lost} could not be started: ")
    assert reason in refusal.lower()
    assert "\n" not in refusal
    assert scaler.advance(0) is None
    actor_group.requests.submit(3)
    scaler.advance(0)
    assert actor_group.newcomers == {2: None}


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        (9, "global_batch_size: 8 samples cannot be cut into 9 workers"),
        (1, "strategy.backup_workers: must be less than the 1 workers (got 1)"),
        (3, "1 more worker needs 1 CPU"),
    ],
)
def test_rejected_request_keeps_the_earlier_one(
    actor_group: FakeActorGroup, missing_resources: list[str], workers: int, reason: str
) -> None:
    scaler = submit_request(actor_group, 4)
    missing_resources.append("1 more worker needs 1 CPU" if workers == 3 else "")
    if workers == 3:  # no new worker yet
        scaler = SyncScaler(cast(ActorGroup, actor_group), actor_group.requests)
        actor_group.newcomers.clear()
    assert reason in scaler.refusal(workers)
    actor_group.requests.submit(workers)  # the request was valid when it was submitted
    assert scaler.advance(0) is None
    status = actor_group.requests.status()
    assert status.request == ScaleRequest(2, workers)
    assert reason in status.refused
    assert list(actor_group.newcomers) == ([] if workers == 3 else [2, 3])


def test_request_for_current_world_is_granted_at_once(actor_group: FakeActorGroup) -> None:
    submit_request(actor_group, 2)
    assert actor_group.requests.status() == ScaleStatus(ScaleRequest(1, 2))


def test_later_request_replaces_earlier_one(actor_group: FakeActorGroup) -> None:
    scaler = submit_request(actor_group, 5)
    actor_group.requests.submit(3)
    assert scaler.advance(0) is None
    assert actor_group.newcomers == {2: None}
    actor_group.newcomers[2] = "ready"
    assert scaler.advance(0) == 3
    assert actor_group.requests.status() == ScaleStatus(ScaleRequest(2, 3), pending=True)


def test_new_workers_are_restarted_with_all_others(actor_group: FakeActorGroup) -> None:
    scaler = submit_request(actor_group, 4)
    actor_group.newcomers.clear()  # ended with all other actors
    scaler.all_restarted()
    assert scaler.advance(0) is None
    assert actor_group.newcomers == {2: None, 3: None}
    actor_group.requests.submit(2)
    assert scaler.advance(0) is None
    assert actor_group.newcomers == {}
