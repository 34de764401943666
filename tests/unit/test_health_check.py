"""Servers that die, are silent while they start, or freeze later."""

import threading
import time

import pytest
from call_faults import Fault, inject
from polled_servers import servers

from distplat.actors.servers.health_check import HealthCheck, Heartbeats
from distplat.actors.servers.replication_manager import ReplicationManager
from distplat.platform.errors import ActorLost
from distplat.platform.server_group import Order, ServerGroup
from distplat.platform.spec import Failure

SOON_S = 60.0
FROZEN = Fault(delay_s=1e6)


def test_a_dead_server_is_noted_at_once() -> None:
    cluster, actors = servers(2)
    losing = threading.Event()
    watch = HealthCheck(cluster.transport(), actors, 60.0, losing)
    actors[1].die("for a test")
    assert losing.wait(SOON_S)
    assert isinstance(watch.lost, ActorLost)
    assert "server-1 was lost" in str(watch.lost)


def test_a_question_is_open_when_a_server_dies() -> None:
    """Else its death would be noted half a second later, when it is asked again."""
    cluster, actors = servers(1)
    beats, named = Heartbeats(cluster.transport(), 60.0), {"server-0": actors[0]}
    until = time.monotonic() + SOON_S
    while not beats.has_answered("server-0"):
        assert beats.find_lost(named, ()) == {}
        assert time.monotonic() < until
    assert beats.find_lost(named, ()) == {}
    time.sleep(0.1)  # it would have been answered, if the server did not keep its answer back
    assert len(cluster.open_calls()) == 1
    actors[0].die("for a test")
    assert list(beats.find_lost(named, ())) == ["server-0"]


@pytest.mark.parametrize(
    ("fault", "why"), [(FROZEN, "frozen or cut off"), (Fault(lose="reply"), "its answer got lost")]
)
def test_silence_counts_when_servers_have_their_shards(fault: Fault, why: str) -> None:
    cluster, actors = servers(1)
    inject(cluster, "poll", fault, times=1000)
    losing = threading.Event()
    watch = HealthCheck(cluster.transport(), actors, 0.1, losing)
    assert not losing.wait(0.5), "it is starting"
    watch.begin()
    assert losing.wait(SOON_S)
    told = f"not answered for 0.1 s ({why}); `failure.heartbeat_timeout_s` changes this deadline"
    assert told in str(watch.lost)


def test_a_lost_answer_is_no_lost_server() -> None:
    cluster, actors = servers(1)
    inject(cluster, "poll", Fault(lose="reply"))
    losing = threading.Event()
    watch = HealthCheck(cluster.transport(), actors, 60.0, losing)
    watch.begin()
    until = time.monotonic() + SOON_S
    while not watch._heartbeats.has_answered("server-0"):  # it was asked again
        assert time.monotonic() < until
        time.sleep(0.01)
    assert not losing.is_set()
    actors[0].die("for a test")  # lets the thread end
    assert losing.wait(SOON_S)


def test_a_watch_that_ends_by_a_fault_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would hear of a server that dies afterwards."""

    def fail(*args: object) -> dict[str, str]:
        raise KeyError(0)

    monkeypatch.setattr(Heartbeats, "find_lost", fail)
    cluster, actors = servers(1)
    losing = threading.Event()
    watch = HealthCheck(cluster.transport(), actors, 60.0, losing)
    assert losing.wait(SOON_S)
    assert str(watch.lost) == "server-manager was lost: its health checks ended: KeyError(0)"


def test_a_replication_that_ends_by_a_fault_of_its_own_says_so() -> None:
    class Broken(ServerGroup):
        def start_backups(self) -> list[Order]:
            raise KeyError("server-7")

    cluster, actors = servers(1)
    group = Broken(1)
    handles = {"server-0": actors[0]}
    nothing = lambda *args: None  # noqa: E731
    losing = threading.Event()
    looked_after = ReplicationManager(
        cluster.transport(), group, handles, Failure(), nothing, nothing, losing
    )
    assert losing.wait(SOON_S)
    assert looked_after.wait_past(group.version, SOON_S)
    assert "server-manager was lost: its replication thread ended" in str(looked_after.lost)
