"""The body of a resize without Ray: who is made and let go, what is answered, what is due."""

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
    """Two workers, and newcomers by rank: what their call came to, or None while it is open."""

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
def lacking() -> list[str]:
    """What the cluster lacks."""
    return []


@pytest.fixture
def actor_group(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, lacking: list[str]
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
    monkeypatch.setattr(resizing, "lacks", lambda job, more: "".join(lacking))
    return fake


def made(actor_group: FakeActorGroup, workers: int) -> SyncScaler:
    resizer = SyncScaler(cast(ActorGroup, actor_group), actor_group.requests)
    actor_group.requests.submit(workers)
    assert resizer.advance(0) is None
    return resizer


def test_newcomers_are_ready_before_anything_is_due(actor_group: FakeActorGroup) -> None:
    resizer = made(actor_group, 4)
    assert actor_group.newcomers == {2: None, 3: None}
    actor_group.newcomers[3] = "ready"
    assert resizer.advance(0) is None
    actor_group.newcomers[2] = "ready"
    assert resizer.advance(0) == 4
    assert resizer.advance(0) == 4, "until it is so"
    assert actor_group.requests.status().pending
    actor_group.resize(4)
    resizer.resized()
    assert (resizer.advance(0), resizer.world) == (None, 4)
    assert actor_group.requests.status() == ScaleStatus(ScaleRequest(1, 4))
    assert resizer.advance(0) is None


@pytest.mark.parametrize("lost", [2, 3])
@pytest.mark.parametrize(
    ("outcome", "said"),
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
def test_when_one_cannot_come_all_are_let_go(
    actor_group: FakeActorGroup, clock: Clock, lost: int, outcome: object, said: str
) -> None:
    resizer = made(actor_group, 4)
    actor_group.newcomers |= {lost: outcome, 5 - lost: "ready" if lost == 3 else None}
    clock.now = 7.1
    assert resizer.advance(0) is None
    assert actor_group.newcomers == {}
    status = actor_group.requests.status()
    assert (status.request, status.pending) == (ScaleRequest(1, 4), False)
    refused = status.refused
    assert refused.startswith(f"worker-{lost} could not be started: ")
    assert said in refused.lower()
    assert "\n" not in refused
    assert resizer.advance(0) is None
    actor_group.requests.submit(3)
    resizer.advance(0)
    assert actor_group.newcomers == {2: None}


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        (9, "global_batch_size: 8 samples cannot be cut into 9 workers"),
        (1, "strategy.backup_workers: must be less than the 1 workers (got 1)"),
        (3, "1 more worker needs 1 CPU"),
    ],
)
def test_what_cannot_be_had_is_refused_and_the_wish_before_stands(
    actor_group: FakeActorGroup, lacking: list[str], workers: int, said: str
) -> None:
    resizer = made(actor_group, 4)
    lacking.append("1 more worker needs 1 CPU" if workers == 3 else "")
    if workers == 3:  # nobody has come yet
        resizer = SyncScaler(cast(ActorGroup, actor_group), actor_group.requests)
        actor_group.newcomers.clear()
    assert said in resizer.refusal(workers)
    actor_group.requests.submit(workers)  # it could be had when it was asked for
    assert resizer.advance(0) is None
    status = actor_group.requests.status()
    assert status.request == ScaleRequest(2, workers)
    assert said in status.refused
    assert list(actor_group.newcomers) == ([] if workers == 3 else [2, 3])


def test_as_many_as_there_are_is_granted_at_once(actor_group: FakeActorGroup) -> None:
    made(actor_group, 2)
    assert actor_group.requests.status() == ScaleStatus(ScaleRequest(1, 2))


def test_a_later_request_replaces_the_earlier(actor_group: FakeActorGroup) -> None:
    resizer = made(actor_group, 5)
    actor_group.requests.submit(3)
    assert resizer.advance(0) is None
    assert actor_group.newcomers == {2: None}
    actor_group.newcomers[2] = "ready"
    assert resizer.advance(0) == 3
    assert actor_group.requests.status() == ScaleStatus(ScaleRequest(2, 3), pending=True)


def test_when_all_were_made_anew_newcomers_are_made_again(actor_group: FakeActorGroup) -> None:
    resizer = made(actor_group, 4)
    actor_group.newcomers.clear()  # they ended with all others
    resizer.all_restarted()
    assert resizer.advance(0) is None
    assert actor_group.newcomers == {2: None, 3: None}
    actor_group.requests.submit(2)
    assert resizer.advance(0) is None
    assert actor_group.newcomers == {}
