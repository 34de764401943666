"""Calls under way: asked again when an answer got lost, given up when nobody wants it."""

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from call_faults import Fault, inject

from distplat.actors import retrying_calls
from distplat.actors.local_transport import LocalCluster
from distplat.actors.retrying_calls import PendingCall
from distplat.actors.transport import AnswerPending
from distplat.platform import awake_clock
from distplat.platform.errors import ActorLost, DeadlineExceeded, InfrastructureError, StaleError

FROZEN = Fault(delay_s=1e6)


class Server:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def push(self, answer: Any) -> Any:
        self.calls += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


class Servers:
    """Some of them, and one question to each."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.cluster = answers, LocalCluster()
        names = [f"server-{number}" for number in range(len(answers))]
        self.actors = [self.cluster.spawn(name, "here", lambda _: Server()) for name in names]

    def ask(self, *, limit_s: float = 5.0, given_up: bool = False) -> PendingCall:
        def look() -> None:
            if given_up:
                raise InfrastructureError("told to give up")

        transport = self.cluster.transport()
        calls = {
            actor.name: partial(transport.call, actor, "push", answer)
            for actor, answer in zip(self.actors, self.answers, strict=True)
        }
        return PendingCall(transport, "push 3", calls, limit_s, "step_timeout_s", look)


def test_answers_come_in_the_order_of_the_calls() -> None:
    servers = Servers(1, 2, None)
    inject(servers.cluster, "push", Fault(delay_s=0.05), actor="server-0")
    assert servers.ask().answers() == [1, 2, None]


@pytest.mark.parametrize(("lost", "calls"), [("request", 1), ("reply", 3)])
def test_a_lost_answer_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, lost: Any, calls: int
) -> None:
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.0)
    servers = Servers(1, 2)
    inject(servers.cluster, "push", Fault(lose=lost), actor="server-1", times=2)
    assert servers.ask().answers() == [1, 2]
    assert servers.actors[1].body.calls == calls


def test_the_late_are_named() -> None:
    servers = Servers(1, 2, 3)
    for late in ("server-1", "server-2"):
        inject(servers.cluster, "push", FROZEN, actor=late)
    with pytest.raises(DeadlineExceeded) as caught:
        servers.ask(limit_s=0.5).wait()
    assert caught.value.missing == ("server-1", "server-2")
    assert caught.value.setting == "failure.step_timeout_s"


def test_who_cannot_be_reached_for_long_is_late() -> None:
    servers = Servers(1)
    inject(servers.cluster, "push", Fault(lose="reply"), times=1000)
    with pytest.raises(DeadlineExceeded, match=r"push 3: waited 0\.2 s, missing: server-0"):
        servers.ask(limit_s=0.2).wait()


def test_a_wait_is_given_up() -> None:
    servers = Servers(1)
    inject(servers.cluster, "push", FROZEN)
    with pytest.raises(InfrastructureError, match="told to give up"):
        servers.ask(given_up=True).wait()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_dead_are_named(moment: Any) -> None:
    servers = Servers(1, 2)
    inject(servers.cluster, "push", Fault(kill=moment), actor="server-1")
    with pytest.raises(ActorLost, match=f"server-1 was lost: server-1 died: {moment} push"):
        servers.ask().wait()
    with pytest.raises(ActorLost, match="server-1 was lost"):
        servers.ask().wait()


def test_who_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-Z and `fg`: a long time has gone by, and the answer has come meanwhile."""
    servers, clock = Servers(1, 2), [0.0]
    call = servers.ask(limit_s=5.0)
    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep)
    monkeypatch.setattr(awake_clock, "time", fake)
    call.restart_deadline()
    transport, waits = call._transport, 0
    wait = transport.wait

    def stopped(replies: Any, timeout_s: float, **how: Any) -> list[Any]:
        nonlocal waits
        waits += 1
        if waits == 1:
            clock[0] += 3600.0
            return []
        return wait(replies, 5.0, **how)

    monkeypatch.setattr(transport, "wait", stopped)
    assert call.answers() == [1, 2]
    assert waits > 1


def test_a_large_answer_that_does_not_come_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's `get` waits by itself: for the whole deadline, and for no second one."""
    servers, waits = Servers(1), []
    call = servers.ask(limit_s=5.0)

    def get(reply: Any, timeout_s: float) -> Any:
        waits.append(timeout_s)
        raise AnswerPending

    monkeypatch.setattr(call._transport, "get", get)
    with pytest.raises(DeadlineExceeded, match="missing: server-0"):
        call.wait()
    assert waits == [pytest.approx(5.0, abs=1.0)]


def test_errors_come_as_what_they_are() -> None:
    with pytest.raises(StaleError, match="push 2 refused"):
        Servers(1, StaleError("push 2 refused")).ask().wait()
