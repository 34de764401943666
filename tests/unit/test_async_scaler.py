"""What becomes of a request for more or fewer workers."""

from typing import cast

import pytest
from jobs import job_of

from distplat.actors import resizing
from distplat.actors.actor_group import ActorGroup
from distplat.actors.resizing import AsyncScaler, check_scalable
from distplat.platform.errors import SpecError
from distplat.platform.scaling import ScaleRequest, ScaleRequests, ScaleStatus
from distplat.platform.spec import Job


class FakeActorGroup:
    """Some ranks; those that join get numbers that nobody had."""

    job: Job | None = None
    max_workers = 0

    def __init__(self, *ranks: int) -> None:
        self.workers = dict.fromkeys(ranks, object())
        self.told: list[tuple[object, ...]] = []  #: orders to the task scheduler

    def grow(self, count: int, base: int) -> list[int]:
        ranks = [10 + number for number in range(count)]
        self.workers |= dict.fromkeys(ranks, object())
        return ranks

    def order_scheduler(self, method: str, *args: object) -> None:
        self.told.append((method, *args))

    def end_worker(self, rank: int) -> None:
        del self.workers[rank]


@pytest.fixture
def requests() -> ScaleRequests:
    return ScaleRequests()


def made(actor_group: FakeActorGroup, requests: ScaleRequests) -> AsyncScaler:
    return AsyncScaler(cast(ActorGroup, actor_group), requests)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the cluster lacks."""
    lacking: list[str] = []
    monkeypatch.setattr(resizing, "lacks", lambda job, more: "".join(lacking))
    return lacking


def test_without_a_wish_nothing_happens(requests: ScaleRequests) -> None:
    actor_group = FakeActorGroup(0, 1)
    assert made(actor_group, requests).carry_out(0) == []
    assert actor_group.told == []


def test_a_wish_is_carried_out_once(requests: ScaleRequests) -> None:
    actor_group = FakeActorGroup(0, 1)
    change = made(actor_group, requests)
    requests.submit(4)
    assert requests.status().pending
    assert change.carry_out(0) == [10, 11]
    assert change.carry_out(0) == []
    assert requests.status() == ScaleStatus(ScaleRequest(1, 4))
    assert actor_group.told == []
    assert len(actor_group.workers) == 4


def test_the_highest_ranks_leave_and_those_that_are_leaving_do_not_count(
    requests: ScaleRequests,
) -> None:
    actor_group = FakeActorGroup(0, 1, 4, 7)
    change = made(actor_group, requests)
    requests.submit(2)
    change.carry_out(0)
    assert actor_group.told == [("dismiss", (4, 7))]
    assert requests.status() == ScaleStatus(ScaleRequest(1, 2))
    requests.submit(3)
    assert change.carry_out(0) == [10], "4 and 7 go all the same"
    change.left(4)
    assert sorted(actor_group.workers) == [0, 1, 7, 10]
    assert actor_group.told[-1] == ("forget", 4)


def test_what_the_cluster_lacks_is_told(short: list[str], requests: ScaleRequests) -> None:
    short.append("2 more workers need 2 CPU")
    actor_group = FakeActorGroup(0, 1)
    change = made(actor_group, requests)
    assert change.refusal(4) == "2 more workers need 2 CPU"
    assert change.refusal(2) == ""
    requests.submit(4)  # there was room when it was asked for
    assert change.carry_out(0) == []
    assert requests.status() == ScaleStatus(ScaleRequest(1, 4), "2 more workers need 2 CPU")
    assert sorted(actor_group.workers) == [0, 1]


def test_when_all_begin_anew_nobody_is_leaving(requests: ScaleRequests) -> None:
    actor_group = FakeActorGroup(0, 1, 2)
    change = made(actor_group, requests)
    requests.submit(1)
    change.carry_out(0)
    change.all_restarted()
    requests.submit(3)
    assert change.carry_out(0) == []


@pytest.mark.parametrize(
    ("most", "workers", "said"),
    [
        (18, 0, r"must be 1 to 18 \(got 0\)"),
        (18, 19, "got 19"),
        (0, 3, "'ps-sync' cannot change its number of workers while it runs"),
    ],
)
def test_requests_that_no_cluster_could_grant(most: int, workers: int, said: str) -> None:
    actor_group = FakeActorGroup(0, 1)
    actor_group.job, actor_group.max_workers = job_of("ps-sync", 2, global_batch_size=8), most
    with pytest.raises(SpecError, match=said):
        check_scalable(cast(ActorGroup, actor_group), workers)


def test_a_new_task_scheduler_is_told_who_is_leaving(requests: ScaleRequests) -> None:
    actor_group = FakeActorGroup(0, 1, 2)
    change = made(actor_group, requests)
    requests.submit(2)
    change.carry_out(0)
    actor_group.told.clear()
    change.resend()
    assert actor_group.told == [("dismiss", (2,))]
    assert not requests.status().pending, "the controller knows the request, whoever was lost"
