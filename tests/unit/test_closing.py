"""Whatever a worker has reached of its ports, it can leave them, and the true reason comes out."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from distplat.actors.connection import Connection
from distplat.actors.local_transport import LocalCluster, LocalTransport
from distplat.actors.servers.leases import RemoteLeases
from distplat.actors.servers.shards import RemoteShards


def order() -> Any:
    return SimpleNamespace(
        rank=0,
        attempt=0,
        run="run",
        manager=None,
        scheduler=None,
        job=SimpleNamespace(failure=None, plateau=None),
    )


def nowhere() -> LocalTransport:
    return LocalCluster().transport("here", "worker-0")


def test_servers_that_were_never_reached_are_left() -> None:
    shards = RemoteShards(nowhere(), order(), 1, 0, threading.Event())
    shards.close()
    shards.close()


def test_a_scheduler_that_was_never_reached_is_left() -> None:
    leases = RemoteLeases(nowhere(), order(), eager=False, abandoned=threading.Event())
    leases.close()
    leases.close()


def test_one_port_that_cannot_be_closed_hides_nothing_and_the_others_are_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed = []

    class Port:
        def close(self) -> None:
            closed.append(self)

    class Broken(Port):
        def close(self) -> None:
            raise AttributeError("it has no lines")

    connection = Connection(nowhere(), 0)
    last: Any = Port()
    connection._servers, connection._leases = Broken(), last  # type: ignore[assignment]

    def work() -> None:
        try:
            raise ValueError("the true reason")
        finally:
            connection.close()

    with pytest.raises(ValueError, match="the true reason"):
        work()
    assert closed == [last]
    assert "Broken could not be closed" in caplog.text
