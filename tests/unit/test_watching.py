"""Servers that die, are silent while they start, or freeze later."""

import time
from typing import Any

import pytest
import ray

from distplat.actors.servers.watching import Watch
from distplat.platform.errors import ActorLost

SOON_S = 5.0


class Server:
    """Stands for a server's handle; its answer is what `outcome` says."""

    def __init__(self, outcome: Exception | None = None) -> None:
        self.where, self.outcome = self, outcome

    def remote(self) -> "Server":
        return self


@pytest.fixture(autouse=True)
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(server: Server, timeout: float) -> Any:
        if isinstance(server.outcome, ray.exceptions.GetTimeoutError):
            time.sleep(timeout)
        if server.outcome is not None:
            raise server.outcome

    monkeypatch.setattr(ray, "get", get)


SILENT = ray.exceptions.GetTimeoutError("late")


def test_a_dead_server_is_noted_at_once() -> None:
    watch = Watch([Server(), Server(ray.exceptions.ActorDiedError())], 60.0)
    assert watch.losing.wait(SOON_S)
    assert isinstance(watch.lost, ActorLost)
    assert "server-1 was lost" in str(watch.lost)


def test_silence_counts_when_servers_have_their_shards() -> None:
    server = Server(SILENT)
    watch = Watch([server], 0.1)
    assert not watch.losing.wait(0.5), "it is starting"
    watch.begin()
    assert watch.losing.wait(SOON_S)
    assert "not answered for 0.1 s" in str(watch.lost)


def test_a_lost_answer_is_no_lost_server() -> None:
    server = Server(ray.exceptions.ActorUnavailableError("lost", None))
    watch = Watch([server], 0.8)
    watch.begin()
    time.sleep(0.3)
    server.outcome = None
    assert not watch.losing.wait(1.2)
    server.outcome = ray.exceptions.ActorDiedError()  # lets the thread end
    assert watch.losing.wait(SOON_S)
