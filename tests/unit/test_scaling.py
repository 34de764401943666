"""What becomes of a wish for more or fewer workers."""

from typing import cast

import pytest
from recording_handle import RecordingHandle

from distplat.actors import scaling
from distplat.actors.actor_group import ActorGroup
from distplat.actors.scaling import Scaling
from distplat.actors.servers.scheduler import ScaleRequest


class FakeActorGroup:
    """Some ranks; those that join get numbers that nobody had."""

    job = None

    def __init__(self, *ranks: int) -> None:
        self.workers = dict.fromkeys(ranks, object())
        self.scheduler = RecordingHandle()

    def grow(self, count: int, base: int) -> list[int]:
        ranks = [10 + number for number in range(count)]
        self.workers |= dict.fromkeys(ranks, object())
        return ranks

    def part_with(self, rank: int) -> None:
        del self.workers[rank]


def made(actor_group: FakeActorGroup) -> Scaling:
    return Scaling(cast(ActorGroup, actor_group))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the cluster lacks."""
    lacking: list[str] = []
    monkeypatch.setattr(scaling, "lacks", lambda job, more: "".join(lacking))
    return lacking


def test_without_a_wish_nothing_happens() -> None:
    actor_group = FakeActorGroup(0, 1)
    assert made(actor_group).carry_out(0) == []
    assert actor_group.scheduler.calls == []


def test_a_wish_is_carried_out_once() -> None:
    actor_group = FakeActorGroup(0, 1)
    change = made(actor_group)
    change.hear(ScaleRequest(1, 4))
    assert change.carry_out(0) == [10, 11]
    assert change.carry_out(0) == []
    assert actor_group.scheduler.calls == [("answer", 1, "")]
    change.hear(ScaleRequest(1, 4))  # it comes again until the scheduler has the answer
    assert change.carry_out(0) == []
    assert len(actor_group.workers) == 4


def test_the_highest_ranks_leave_and_those_that_are_leaving_do_not_count() -> None:
    actor_group = FakeActorGroup(0, 1, 4, 7)
    change = made(actor_group)
    change.hear(ScaleRequest(1, 2))
    change.carry_out(0)
    assert actor_group.scheduler.calls == [("dismiss", (4, 7)), ("answer", 1, "")]
    change.hear(ScaleRequest(2, 3))
    assert change.carry_out(0) == [10], "4 and 7 go all the same"
    change.left(4)
    assert sorted(actor_group.workers) == [0, 1, 7, 10]
    assert actor_group.scheduler.calls[-1] == ("gone", 4)


def test_what_the_cluster_lacks_is_told(short: list[str]) -> None:
    short.append("2 more workers need 2 CPU")
    actor_group = FakeActorGroup(0, 1)
    change = made(actor_group)
    change.hear(ScaleRequest(3, 4))
    assert change.carry_out(0) == []
    assert actor_group.scheduler.calls == [("answer", 3, "2 more workers need 2 CPU")]
    assert sorted(actor_group.workers) == [0, 1]


def test_when_all_begin_anew_nobody_is_leaving() -> None:
    actor_group = FakeActorGroup(0, 1, 2)
    change = made(actor_group)
    change.hear(ScaleRequest(1, 1))
    change.carry_out(0)
    change.begin_anew()
    change.hear(ScaleRequest(2, 3))
    assert change.carry_out(0) == []
