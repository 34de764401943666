"""Servers that die, are silent while they start, or freeze later."""

import time

from distplat.actors.local_transport import Actor, Fault, LocalCluster
from distplat.actors.servers.health_check import HealthCheck
from distplat.platform.errors import ActorLost

SOON_S = 5.0
FROZEN = Fault(delay_s=1e6)


class Server:
    """Says where it is."""

    def where(self) -> str:
        return "here"


def servers(count: int) -> tuple[LocalCluster, list[Actor]]:
    cluster = LocalCluster()
    names = [f"server-{number}" for number in range(count)]
    return cluster, [cluster.spawn(name, "here", lambda _: Server()) for name in names]


def test_a_dead_server_is_noted_at_once() -> None:
    cluster, actors = servers(2)
    watch = HealthCheck(cluster.transport(), actors, 60.0)
    actors[1].die("for a test")
    assert watch.losing.wait(SOON_S)
    assert isinstance(watch.lost, ActorLost)
    assert "server-1 was lost" in str(watch.lost)


def test_silence_counts_when_servers_have_their_shards() -> None:
    cluster, actors = servers(1)
    cluster.inject("where", FROZEN, times=1000)
    watch = HealthCheck(cluster.transport(), actors, 0.1)
    assert not watch.losing.wait(0.5), "it is starting"
    watch.begin()
    assert watch.losing.wait(SOON_S)
    assert "not answered for 0.1 s" in str(watch.lost)


def test_a_lost_answer_is_no_lost_server() -> None:
    cluster, actors = servers(1)
    cluster.inject("where", Fault(lose="reply"))
    watch = HealthCheck(cluster.transport(), actors, 0.8)
    watch.begin()
    time.sleep(0.3)
    assert not watch.losing.wait(1.2)
    actors[0].die("for a test")  # lets the thread end
    assert watch.losing.wait(SOON_S)
