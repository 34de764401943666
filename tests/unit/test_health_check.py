"""Health checks of servers that die, freeze, or start slowly."""

import threading
import time
from collections.abc import Collection, Mapping
from queue import SimpleQueue
from typing import Any

import pytest
from call_faults import Fault, inject
from polled_servers import spawn_servers

from distplat.actors.local_transport import LocalCluster
from distplat.actors.servers.health_check import TICK_S, HealthCheck, Heartbeats
from distplat.actors.servers.replication_manager import ReplicationManager
from distplat.platform.errors import ActorLost
from distplat.platform.server_group import Order, ServerGroup
from distplat.platform.spec import Failure

LIMIT_S = 60.0
FROZEN = Fault(delay_s=1e6)


def test_dead_server_is_detected_at_once() -> None:
    cluster, actors = spawn_servers(2)
    losing = threading.Event()
    watch = HealthCheck(cluster.transport(), actors, 60.0, losing)
    actors[1].die("for a test")
    assert losing.wait(LIMIT_S)
    assert isinstance(watch.lost, ActorLost)
    assert "server-1 was lost" in str(watch.lost)


class HoldsPolls:
    """Delays its reply to a poll with a delay until it dies."""

    def __init__(self) -> None:
        self.holds = SimpleQueue[float]()  #: delays of the polls
        self._died = threading.Event()

    def poll(self, number: int, hold_s: float) -> None:
        self.holds.put(hold_s)
        assert not hold_s or self._died.wait(LIMIT_S)

    def close(self) -> None:
        self._died.set()


def test_poll_is_pending_when_a_server_dies() -> None:
    """Otherwise the death would be detected half a second later, by the next poll."""
    cluster, server = LocalCluster(), HoldsPolls()
    actor = cluster.spawn("server-0", "here", lambda _: server)
    heartbeats, handles = Heartbeats(cluster.transport(), 60.0), {"server-0": actor}
    deadline = time.monotonic() + LIMIT_S
    while not heartbeats.has_answered("server-0"):
        assert heartbeats.find_lost(handles, ()) == {}
        assert time.monotonic() < deadline
    assert server.holds.get(timeout=LIMIT_S) == 0
    assert heartbeats.find_lost(handles, ()) == {}
    assert server.holds.get(timeout=LIMIT_S) > 0
    assert len(cluster.open_calls()) == 1
    actor.die("for a test")
    assert list(heartbeats.find_lost(handles, ())) == ["server-0"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(FROZEN, "frozen or cut off"), (Fault(lose="reply"), "its answer got lost")],
)
def test_timeout_applies_after_the_start(
    fault: Fault, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, find_lost = threading.Semaphore(0), Heartbeats.find_lost

    def find_and_count(
        heartbeats: Heartbeats, servers: Mapping[str, Any], starting: Collection[str]
    ) -> dict[str, str]:
        lost = find_lost(heartbeats, servers, starting)
        checked.release()
        return lost

    monkeypatch.setattr(Heartbeats, "find_lost", find_and_count)
    cluster, actors = spawn_servers(1)
    inject(cluster, "poll", fault, times=1000)
    losing = threading.Event()
    watch = HealthCheck(cluster.transport(), actors, 0.1, losing)
    for _ in range(round(0.1 / TICK_S) + 3):  # the last but one is after the timeout
        assert checked.acquire(timeout=LIMIT_S)
    assert not losing.is_set(), "the server is starting"
    watch.begin()
    assert losing.wait(LIMIT_S)
    message = (
        f"not answered for 0.1 s ({reason}); `failure.heartbeat_timeout_s` changes this deadline"
    )
    assert message in str(watch.lost)


def test_lost_reply_is_retried() -> None:
    cluster, actors = spawn_servers(1)
    inject(cluster, "poll", Fault(lose="reply"))
    losing = threading.Event()
    watch = HealthCheck(cluster.transport(), actors, 60.0, losing)
    watch.begin()
    deadline = time.monotonic() + LIMIT_S
    while not watch._heartbeats.has_answered("server-0"):  # until the second poll
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not losing.is_set()
    actors[0].die("for a test")  # ends the thread
    assert losing.wait(LIMIT_S)


def test_error_in_the_health_check_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise later deaths of servers would not be detected."""

    def fail(*args: object) -> dict[str, str]:
        raise KeyError(0)

    monkeypatch.setattr(Heartbeats, "find_lost", fail)
    cluster, actors = spawn_servers(1)
    losing = threading.Event()
    watch = HealthCheck(cluster.transport(), actors, 60.0, losing)
    assert losing.wait(LIMIT_S)
    assert str(watch.lost) == "server-manager was lost: its health checks ended: KeyError(0)"


def test_error_in_the_replication_thread_is_reported() -> None:
    class Broken(ServerGroup):
        def start_backups(self) -> list[Order]:
            raise KeyError("server-7")

    cluster, actors = spawn_servers(1)
    group = Broken(1)
    handles = {"server-0": actors[0]}
    noop = lambda *args: None  # noqa: E731
    losing = threading.Event()
    manager = ReplicationManager(cluster.transport(), group, handles, Failure(), noop, noop, losing)
    assert losing.wait(LIMIT_S)
    assert manager.wait_past(group.version, LIMIT_S)
    assert "server-manager was lost: its replication thread ended" in str(manager.lost)
