"""Closing a worker's ports: works in every state, and does not hide the original error."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from distplat.actors.connection import Connection
from distplat.actors.local_transport import LocalCluster, LocalTransport
from distplat.actors.servers.leases import RemoteLeases
from distplat.actors.servers.shards import RemoteShards


def worker_order() -> Any:
    return SimpleNamespace(
        rank=0,
        attempt=0,
        run="run",
        manager=None,
        scheduler=None,
        job=SimpleNamespace(failure=None, plateau=None),
    )


def unconnected_transport() -> LocalTransport:
    return LocalCluster().transport("here", "worker-0")


def test_closes_shards_without_connection() -> None:
    shards = RemoteShards(unconnected_transport(), worker_order(), 1, 0, threading.Event())
    shards.close()
    shards.close()


def test_closes_leases_without_connection() -> None:
    leases = RemoteLeases(
        unconnected_transport(), worker_order(), eager=False, abandoned=threading.Event()
    )
    leases.close()
    leases.close()


def test_failing_close_keeps_the_error_and_closes_other_ports(
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed = []

    class Port:
        def close(self) -> None:
            closed.append(self)

    class Broken(Port):
        def close(self) -> None:
            raise AttributeError("it has no lines")

    connection = Connection(unconnected_transport(), 0)
    last: Any = Port()
    connection._servers, connection._leases = Broken(), last  # type: ignore[assignment]

    def train() -> None:
        try:
            raise ValueError("the original error")
        finally:
            connection.close()

    with pytest.raises(ValueError, match="the original error"):
        train()
    assert closed == [last]
    assert "Broken could not be closed" in caplog.text
