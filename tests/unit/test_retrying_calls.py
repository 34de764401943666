"""PendingCall: lost answers are retried, late and dead actors are named."""

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
    """Some servers, and one call to each."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.cluster = answers, LocalCluster()
        names = [f"server-{number}" for number in range(len(answers))]
        self.actors = [self.cluster.spawn(name, "here", lambda _: Server()) for name in names]

    def call(self, *, limit_s: float = 5.0, cancelled: bool = False) -> PendingCall:
        def check() -> None:
            if cancelled:
                raise InfrastructureError("cancelled by the test")

        transport = self.cluster.transport()
        calls = {
            actor.name: partial(transport.call, actor, "push", answer)
            for actor, answer in zip(self.actors, self.answers, strict=True)
        }
        return PendingCall(transport, "push 3", calls, limit_s, "step_timeout_s", check)


def test_answers_are_in_the_order_of_the_calls() -> None:
    servers = Servers(1, 2, None)
    inject(servers.cluster, "push", Fault(delay_s=0.05), actor="server-0")
    assert servers.call().answers() == [1, 2, None]


@pytest.mark.parametrize(("lost", "calls"), [("request", 1), ("reply", 3)])
def test_lost_answer_is_requested_again(
    monkeypatch: pytest.MonkeyPatch, lost: Any, calls: int
) -> None:
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.0)
    servers = Servers(1, 2)
    inject(servers.cluster, "push", Fault(lose=lost), actor="server-1", times=2)
    assert servers.call().answers() == [1, 2]
    assert servers.actors[1].body.calls == calls


def test_late_servers_are_named() -> None:
    servers = Servers(1, 2, 3)
    for late in ("server-1", "server-2"):
        inject(servers.cluster, "push", FROZEN, actor=late)
    with pytest.raises(DeadlineExceeded) as caught:
        servers.call(limit_s=0.5).wait()
    assert caught.value.missing == ("server-1", "server-2")
    assert caught.value.setting == "failure.step_timeout_s"


def test_unreachable_server_is_late() -> None:
    servers = Servers(1)
    inject(servers.cluster, "push", Fault(lose="reply"), times=1000)
    with pytest.raises(DeadlineExceeded, match=r"push 3: waited 0\.2 s, missing: server-0"):
        servers.call(limit_s=0.2).wait()


def test_check_ends_a_wait() -> None:
    servers = Servers(1)
    inject(servers.cluster, "push", FROZEN)
    with pytest.raises(InfrastructureError, match="cancelled by the test"):
        servers.call(cancelled=True).wait()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_dead_server_is_named(moment: Any) -> None:
    servers = Servers(1, 2)
    inject(servers.cluster, "push", Fault(kill=moment), actor="server-1")
    with pytest.raises(ActorLost, match=f"server-1 was lost: server-1 died: {moment} push"):
        servers.call().wait()
    with pytest.raises(ActorLost, match="server-1 was lost"):
        servers.call().wait()


def test_suspended_caller_does_not_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-Z and `fg`: the answers arrive while the process is suspended."""
    servers, clock = Servers(1, 2), [0.0]
    call = servers.call(limit_s=5.0)
    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep)
    monkeypatch.setattr(awake_clock, "time", fake)
    call.restart_deadline()
    transport, waits = call._transport, 0
    wait = transport.wait

    def suspended_wait(replies: Any, timeout_s: float, **options: Any) -> list[Any]:
        nonlocal waits
        waits += 1
        if waits == 1:
            clock[0] += 3600.0
            return []
        return wait(replies, 5.0, **options)

    monkeypatch.setattr(transport, "wait", suspended_wait)
    assert call.answers() == [1, 2]
    assert waits > 1


def test_missing_answer_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's `get` waits for the whole deadline, so no second wait may follow."""
    servers, waits = Servers(1), []
    call = servers.call(limit_s=5.0)

    def get(reply: Any, timeout_s: float) -> Any:
        waits.append(timeout_s)
        raise AnswerPending

    monkeypatch.setattr(call._transport, "get", get)
    with pytest.raises(DeadlineExceeded, match="missing: server-0"):
        call.wait()
    assert waits == [pytest.approx(5.0, abs=1.0)]


def test_errors_of_servers_keep_their_type() -> None:
    with pytest.raises(StaleError, match="push 2 refused"):
        Servers(1, StaleError("push 2 refused")).call().wait()
