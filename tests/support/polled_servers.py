"""Actors that answer health checks only."""

import time

from distplat.actors.local_transport import Actor, LocalCluster


class Server:
    """Answers health checks."""

    def poll(self, number: int, hold_s: float) -> None:
        time.sleep(hold_s)


def spawn_servers(count: int) -> tuple[LocalCluster, list[Actor]]:
    """Create a cluster and its servers."""
    cluster = LocalCluster()
    names = [f"server-{number}" for number in range(count)]
    return cluster, [cluster.spawn(name, "here", lambda _: Server()) for name in names]
