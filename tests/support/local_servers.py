"""
The actors of a run in memory, with options for tests: two nodes, several attempts, server speeds.

Nodes are names: a worker on the servers' node uses shared memory and mailboxes, a worker on another
node sends bytes in calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from typing_extensions import override

from distplat.actors import local_actors
from distplat.actors.local_actors import HERE, handle_of, order_of
from distplat.actors.local_transport import Actor, LocalCluster, LocalTransport
from distplat.actors.messages import TablePart
from distplat.actors.servers.leases import RemoteLeases
from distplat.actors.servers.manager import ServerManager
from distplat.actors.servers.node import ServerNode
from distplat.actors.servers.scheduler import Scheduler
from distplat.actors.servers.shards import RemoteShards
from distplat.actors.servers.tables import RemoteTables
from distplat.platform.errors import DistplatError
from distplat.platform.shard_map import Shard
from distplat.platform.spec import Consistency, Job
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.server.server import ShardServer
from distplat.strategies.server.table_store import TableServer
from distplat.strategies.strategy_spec import Roles

ELSEWHERE = "node-1"
"""A node that shares no memory with the servers' node, `HERE`."""


class LocalTaskScheduler(local_actors.LocalTaskScheduler):
    """
    See `local_actors.LocalTaskScheduler`.

    Args:
        job: the run's job.
        roles: of the job's strategy.
        make: creates the scheduler.
    """

    def __init__(
        self, job: Job, roles: Roles, make: Callable[[str, Job, Consistency], Scheduler]
    ) -> None:
        self._maker = make
        super().__init__(job, roles)

    @override
    def _create(self, transport: LocalTransport) -> Scheduler:
        return self._maker("task-scheduler", self.job, self.consistency)

    @override
    def leases(
        self, rank: int, *, attempt: int = 0, abandoned: threading.Event | None = None
    ) -> RemoteLeases:
        order = order_of(self.job, self.run, rank, attempt, scheduler=self.scheduler)
        transport, eager = (
            self.cluster.transport(HERE, f"worker-{rank}"),
            self.consistency.bound is not None,
        )
        return self._keep(RemoteLeases(transport, order, eager, abandoned or threading.Event()))


class TableServers(local_actors.TableServers):
    """
    See `local_actors.TableServers`; with backups if the job replicates tables.

    Args:
        job: the run's job.
        rewinds: see `TablePlan`.
        every: steps between two checkpoints; 0: checkpoints are disabled.
    """

    def __init__(self, job: Job, *, rewinds: bool = False, every: int = 0) -> None:
        self._rewinds = rewinds
        self.replicated = job.embeddings is not None and job.embeddings.replication > 1
        self._all_servers: dict[str, Actor] = {}  #: including lost servers
        super().__init__(job, every=every)
        self._primaries = self.nodes
        self.manager: Actor | None = None
        if self.replicated:
            self.make_manager(adopts=False)

    def make_manager(self, *, adopts: bool) -> None:
        """Create a manager; `adopts`: the servers belonged to an earlier manager."""

        def make(transport: LocalTransport) -> ServerManager:
            args = "table-manager", self.job, self.run, int(adopts), dict[str, Any](), Roles()
            tables = dict(self._all_servers)
            return ServerManager(*args, tables=tables, adopts=adopts, transport=transport)

        self.manager = self.cluster.spawn("table-manager", HERE, make)
        _set_controller(self.cluster, self.manager, self._make_node)

    @override
    def _make_node(self, name: str) -> Actor:
        index, limit_s = int(name.rpartition("-")[2]), self.job.failure.step_timeout_s
        part = TablePart(name, index, self.replicated, limit_s)
        node = self.cluster.spawn(name, HERE, partial(ServerNode, name, tables=part))
        self._all_servers[name] = node
        return node

    @property
    @override
    def table_servers(self) -> list[TableServer]:
        self._update_primaries()
        return [node.body.serving.server for node in self._primaries]

    def _update_primaries(self) -> None:
        if self.manager is not None and not self.manager.died:
            self._primaries = tuple(self.manager.body.table_servers(0, 0.0).servers)

    @override
    def close(self) -> None:
        self.end_attempt()
        if self.manager is not None:
            with suppress(DistplatError):  # a lost server has no backup
                self._update_primaries()
            self.manager.die("the run is over")  # before the manager detects the end of its servers
        super().close()

    @override
    def tables(
        self,
        rank: int,
        *,
        attempt: int = 0,
        node: str = HERE,
        job: Job | None = None,
        saved: SavedState | None = None,
        abandoned: threading.Event | None = None,
    ) -> RemoteTables:
        """
        Return a worker's client of the servers.

        Args:
            rank: the worker's.
            attempt: of the run.
            node: the worker's.
            job: of the attempt, if the number of workers has changed.
            saved: the checkpoint from which the run started.
            abandoned: once set, waits end.
        """
        transport = self.cluster.transport(node, f"worker-{rank}")
        order = order_of(
            job or self.job,
            self.run,
            rank,
            attempt,
            manager=self.manager,
            embedding_servers=self.nodes,
            saved=handle_of(saved, transport),
            rewinds=self._rewinds,
        )
        abandoned = abandoned or threading.Event()
        return self._keep(RemoteTables(transport, order, self._every, abandoned))


class Servers(local_actors.Servers):
    """
    See `local_actors.Servers`.

    Args:
        job: the run's job.
        roles: roles of the job's strategy, with at least one server.
        speeds: speeds of the servers in elements per second, which define the shards' sizes; empty:
            equal sizes.
        backups: node of servers created during the run.
    """

    def __init__(
        self, job: Job, roles: Roles, *, speeds: Sequence[float] = (), backups: str = HERE
    ) -> None:
        super().__init__(job, replace(roles, split_by_load=bool(speeds)))
        for node, speed in zip(self.nodes.values(), speeds, strict=False):
            node.body.speed = partial(_speed, speed)
        if self.roles.replication > 1:
            make = partial(self._make_node, node=backups)
            _set_controller(self.cluster, self.manager, make)

    @override
    def shards(
        self,
        rank: int,
        total_steps: int,
        *,
        attempt: int = 0,
        every: int = 0,
        node: str = HERE,
        job: Job | None = None,
        abandoned: threading.Event | None = None,
    ) -> RemoteShards:
        """
        Return a worker's client of the servers of its part of the model.

        Args:
            rank: the worker's.
            total_steps: updates in the run.
            attempt: of the run.
            every: steps between two checkpoints; 0: checkpoints are disabled.
            node: the worker's.
            job: of the attempt, if the number of workers has changed.
            abandoned: once set, waits end.
        """
        order = order_of(job or self.job, self.run, rank, attempt, manager=self.manager)
        transport = self.cluster.transport(node, f"worker-{rank}")
        abandoned = abandoned or threading.Event()
        return self._keep(RemoteShards(transport, order, total_steps, every, abandoned))

    def shard_servers(self, part: int = 0) -> list[ShardServer]:
        """Return the servers of all shards of a part of the model."""
        return [self.shard_server(shard, part) for shard in range(self.division.servers_per_part)]

    def cuts(self, part: int = 0) -> list[Shard | None]:
        """Return the range of the vector of each shard of a part."""
        numbers = self.division.servers_of(part)
        return [self.nodes[f"server-{number}"].body.held().cut for number in numbers]

    def renew(self, attempt: int, world: int | None = None) -> None:
        """Start a later attempt: waits of the earlier one at the servers fail."""
        for node in self.nodes.values():
            server: ShardServer | None = node.body.serving.server
            if server is not None:
                server.exclusively(partial(server.renew, attempt, world))


def _speed(speed: float, job: Job, world: int, dtype: str) -> float:
    return speed


class _ServerMaker:
    """Creates servers for a manager, as the controller of a run on Ray does."""

    def __init__(self, make: Callable[[str], Actor]) -> None:
        self._make, self._servers = make, dict[str, Actor]()
        self._making = threading.Lock()

    def make_server(self, attempt: int, server: str, beside: str) -> Actor:
        """Create a server node, once for each name; see `ActorGroup`."""
        with self._making:
            if server not in self._servers:
                self._servers[server] = self._make(server)
            return self._servers[server]


def _set_controller(cluster: LocalCluster, manager: Actor, make: Callable[[str], Actor]) -> None:
    """Give a manager a controller that creates servers by `make`."""
    controller = cluster.spawn("controller", HERE, lambda _: _ServerMaker(make))
    manager.body.begin(controller)


def wait_for_backups(servers: Servers) -> None:
    """Wait until the backup of every shard is filled."""
    deadline = time.monotonic() + 60
    while not all(assignment.ready for assignment in servers.manager.body.assignments()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
