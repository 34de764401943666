"""Changing the number of workers of an asynchronous run."""

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
    """A group of ranks; workers that join get ranks from 10 on."""

    job: Job | None = None
    max_workers = 0

    def __init__(self, *ranks: int) -> None:
        self.workers = dict.fromkeys(ranks, object())
        self.orders: list[tuple[object, ...]] = []  #: calls of the task scheduler

    def grow(self, count: int, base: int) -> list[int]:
        ranks = [10 + number for number in range(count)]
        self.workers |= dict.fromkeys(ranks, object())
        return ranks

    def order_scheduler(self, method: str, *args: object) -> None:
        self.orders.append((method, *args))

    def end_worker(self, rank: int) -> None:
        del self.workers[rank]


@pytest.fixture
def requests() -> ScaleRequests:
    return ScaleRequests()


def scaler_of(actor_group: FakeActorGroup, requests: ScaleRequests) -> AsyncScaler:
    return AsyncScaler(cast(ActorGroup, actor_group), requests)


@pytest.fixture(autouse=True)
def missing_resources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Set the resources that the cluster lacks."""
    missing: list[str] = []
    monkeypatch.setattr(resizing, "lacks", lambda job, more: "".join(missing))
    return missing


def test_does_nothing_without_a_request(requests: ScaleRequests) -> None:
    actor_group = FakeActorGroup(0, 1)
    assert scaler_of(actor_group, requests).carry_out(0) == []
    assert actor_group.orders == []


def test_request_is_carried_out_once(requests: ScaleRequests) -> None:
    actor_group = FakeActorGroup(0, 1)
    scaler = scaler_of(actor_group, requests)
    requests.submit(4)
    assert requests.status().pending
    assert scaler.carry_out(0) == [10, 11]
    assert scaler.carry_out(0) == []
    assert requests.status() == ScaleStatus(ScaleRequest(1, 4))
    assert actor_group.orders == []
    assert len(actor_group.workers) == 4


def test_shrink_dismisses_highest_ranks_and_excludes_leaving_ranks(
    requests: ScaleRequests,
) -> None:
    actor_group = FakeActorGroup(0, 1, 4, 7)
    scaler = scaler_of(actor_group, requests)
    requests.submit(2)
    scaler.carry_out(0)
    assert actor_group.orders == [("dismiss", (4, 7))]
    assert requests.status() == ScaleStatus(ScaleRequest(1, 2))
    requests.submit(3)
    assert scaler.carry_out(0) == [10], "ranks 4 and 7 leave anyway"
    scaler.left(4)
    assert sorted(actor_group.workers) == [0, 1, 7, 10]
    assert actor_group.orders[-1] == ("forget", 4)


def test_reports_missing_resources(missing_resources: list[str], requests: ScaleRequests) -> None:
    missing_resources.append("2 more workers need 2 CPU")
    actor_group = FakeActorGroup(0, 1)
    scaler = scaler_of(actor_group, requests)
    assert scaler.refusal(4) == "2 more workers need 2 CPU"
    assert scaler.refusal(2) == ""
    requests.submit(4)  # resources were free at the time of the request
    assert scaler.carry_out(0) == []
    assert requests.status() == ScaleStatus(ScaleRequest(1, 4), "2 more workers need 2 CPU")
    assert sorted(actor_group.workers) == [0, 1]


def test_restart_of_all_workers_clears_leaving_ranks(requests: ScaleRequests) -> None:
    actor_group = FakeActorGroup(0, 1, 2)
    scaler = scaler_of(actor_group, requests)
    requests.submit(1)
    scaler.carry_out(0)
    scaler.all_restarted()
    requests.submit(3)
    assert scaler.carry_out(0) == []


@pytest.mark.parametrize(
    ("max_workers", "workers", "message"),
    [
        (18, 0, r"must be 1 to 18 \(got 0\)"),
        (18, 19, "got 19"),
        (0, 3, "'ps-sync' cannot change its number of workers while it runs"),
    ],
)
def test_rejects_impossible_requests(max_workers: int, workers: int, message: str) -> None:
    actor_group = FakeActorGroup(0, 1)
    actor_group.job = job_of("ps-sync", 2, global_batch_size=8)
    actor_group.max_workers = max_workers
    with pytest.raises(SpecError, match=message):
        check_scalable(cast(ActorGroup, actor_group), workers)


def test_resends_leaving_ranks_to_a_new_task_scheduler(requests: ScaleRequests) -> None:
    actor_group = FakeActorGroup(0, 1, 2)
    scaler = scaler_of(actor_group, requests)
    requests.submit(2)
    scaler.carry_out(0)
    actor_group.orders.clear()
    scaler.resend()
    assert actor_group.orders == [("dismiss", (2,))]
    assert not requests.status().pending, "the controller keeps the request"
