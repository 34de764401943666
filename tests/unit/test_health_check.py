"""Health checks of servers that die, freeze, or start slowly."""

import threading
import time

import pytest
from call_faults import Fault, inject
from polled_servers import spawn_servers

from distplat.actors.servers.health_check import HealthCheck, Heartbeats
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


def test_poll_is_pending_when_a_server_dies() -> None:
    """Otherwise the death would be detected half a second later, by the next poll."""
    cluster, actors = spawn_servers(1)
    heartbeats, handles = Heartbeats(cluster.transport(), 60.0), {"server-0": actors[0]}
    deadline = time.monotonic() + LIMIT_S
    while not heartbeats.has_answered("server-0"):
        assert heartbeats.find_lost(handles, ()) == {}
        assert time.monotonic() < deadline
    assert heartbeats.find_lost(handles, ()) == {}
    time.sleep(0.1)  # enough time for a response, if the server did not delay it
    assert len(cluster.open_calls()) == 1
    actors[0].die("for a test")
    assert list(heartbeats.find_lost(handles, ())) == ["server-0"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(FROZEN, "frozen or cut off"), (Fault(lose="reply"), "its answer got lost")],
)
def test_timeout_applies_after_the_start(fault: Fault, reason: str) -> None:
    cluster, actors = spawn_servers(1)
    inject(cluster, "poll", fault, times=1000)
    losing = threading.Event()
    watch = HealthCheck(cluster.transport(), actors, 0.1, losing)
    assert not losing.wait(0.5), "the server is starting"
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
