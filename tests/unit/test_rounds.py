"""A question to all servers: each is asked in its time, and its answer is taken when it comes."""

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from distplat.actors.memory.bell import Request
from distplat.actors.servers.lines import Lines, Round
from distplat.platform.ledger import Answer
from distplat.platform.shard_map import Shard, cut_shards

CUTS = cut_shards(48, 3).shards


class Call:
    """A call of Ray: answered when a test says so."""

    def __init__(self) -> None:
        self.answer: Future[Any] = Future()

    def future(self) -> "Future[Any]":
        return self.answer


class Cluster:
    """Stands for Ray, and for the bells of some shards."""

    def __init__(self, patch: pytest.MonkeyPatch, near: set[int]) -> None:
        self.calls: dict[int, Call] = {}
        self.order: list[int] = []  #: in which order calls are answered, when somebody waits
        self.rung: list[int] = []
        self.shards = sorted(near)
        self.fetched: list[int] = []
        bells = self if near else None
        self.lines = SimpleNamespace(
            cuts=CUTS,
            servers=[0, 1, 2],
            names=["server-0", "server-1", "server-2"],
            bells=bells,
            look=None,
            limit_s=lambda setting: 5.0,
        )
        patch.setattr(ray, "wait", self.wait)
        patch.setattr(ray, "get", lambda call, timeout: call.answer.result(timeout))

    def wait(self, calls: list[Call], **_: Any) -> tuple[list[Call], list[Call]]:
        """Have the next call answered, if none of these is."""
        while not any(call.answer.done() for call in calls):
            self.reply(self.order.pop(0))
        done = [call for call in calls if call.answer.done()]
        return done[:1], [call for call in calls if call is not done[0]]

    def reply(self, shard: int) -> None:
        payload = SimpleNamespace(future=lambda: self.fetched.append(shard))
        self.calls[shard].answer.set_result(Answer(shard, payload=[payload]))

    def ask(self, server: int, cut: Shard) -> Call:
        return self.calls.setdefault(server, Call())

    def ring(self, shard: int, request: Request) -> None:
        self.rung.append(shard)

    def answers(self, rung: list[int], *_: Any) -> Any:
        yield from ((shard, Answer(shard)) for shard in rung)

    def round(self, take: Callable[[Shard, Answer], None], *, bells: bool = True) -> Round:
        request = Request(0) if bells else None
        return Round(cast(Lines, self.lines), "push 0", self.ask, take, request)


def test_each_answer_is_taken_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, taken = Cluster(monkeypatch, set()), list[int]()
    cluster.order = [2, 0, 1]
    asked = cluster.round(lambda cut, answer: taken.append(cut.index))
    asked.send(CUTS)
    assert [answer.version for answer in asked.answers()] == [0, 1, 2]
    assert taken == [2, 0, 1]


def test_values_travel_before_anybody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, taken = Cluster(monkeypatch, set()), list[int]()
    asked = cluster.round(lambda cut, answer: taken.append(cut.index))
    asked.send(CUTS[2:])
    assert not cluster.fetched
    cluster.reply(2)
    assert cluster.fetched == [2] and not taken
    asked.send(CUTS[:2])
    assert sorted(cluster.calls) == [0, 1, 2]


def test_near_servers_are_rung_and_far_ones_called(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, taken = Cluster(monkeypatch, {1}), list[int]()
    cluster.order = [2, 0]
    asked = cluster.round(lambda cut, answer: taken.append(cut.index))
    asked.send(CUTS[1:])
    assert cluster.rung == [1] and sorted(cluster.calls) == [2]
    asked.send(CUTS[:1])
    assert [answer.version for answer in asked.answers()] == [0, 1, 2]
    assert taken == [1, 2, 0]


def test_a_pull_is_a_call_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, {0, 1, 2})
    cluster.order = [0, 1, 2]
    asked = cluster.round(lambda cut, answer: None, bells=False)
    asked.send(CUTS)
    asked.answers()
    assert cluster.rung == [] and sorted(cluster.calls) == [0, 1, 2]
