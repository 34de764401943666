"""
The actors of a run in the calling process: servers, their manager, the task scheduler. No Ray.

They are those of a run on Ray, over `LocalTransport`. `num_workers: 0` trains with them, and so do
tests, which make ranks of threads and disturb their calls. Nodes are names: a worker on the
servers' node computes on their memory and writes into their mailboxes, one on another node sends
bytes in calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplat.actors.local_transport import Actor, LocalCluster, LocalTransport
from distplat.actors.messages import SavedHandle, TablePart, WorkOrder
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

HERE = "node-0"
"""The servers' node."""
ELSEWHERE = "node-1"


class TaskDesk:
    """
    The task scheduler of one run.

    Args:
        job: the run's job.
        roles: what its strategy needs.
        run: its name.
        make: makes the scheduler.
    """

    def __init__(
        self,
        job: Job,
        roles: Roles,
        run: str = "run",
        *,
        make: Callable[[str, Job, Consistency], Scheduler] = Scheduler,
    ) -> None:
        self.job, self.run, self._how = job, run, roles.consistency
        self.cluster = LocalCluster()
        self._clients: list[RemoteLeases] = []
        name = "task-scheduler"
        self.scheduler = self.cluster.spawn(name, HERE, lambda _: make(name, job, self._how))

    def leases(
        self, rank: int, *, attempt: int = 0, abandoned: threading.Event | None = None
    ) -> RemoteLeases:
        """Give a worker's way to it; see `Servers.shards`."""
        order = order_of(self.job, self.run, rank, attempt, scheduler=self.scheduler)
        transport = self.cluster.transport(HERE, f"worker-{rank}")
        eager = self._how.bound is not None
        found = RemoteLeases(transport, order, eager, abandoned or threading.Event())
        self._clients.append(found)
        return found

    def call(self, method: str, *args: Any) -> Any:
        """Call the scheduler, and wait for its answer."""
        transport = self.cluster.transport()
        limit_s = self.job.failure.start_timeout_s
        return transport.get(transport.call(self.scheduler, method, *args), limit_s)

    def close(self) -> None:
        """End it."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        self.cluster.close()


class TableServers:
    """
    Servers of embedding tables, for one run.

    Args:
        job: the run's job; has the field `embeddings`, or there are none.
        run: its name.
        rewinds: see `TablePlan`.
        every: steps between two checkpoints; 0: there are none.
        cluster: where they live; None: one of their own.
    """

    def __init__(
        self,
        job: Job,
        run: str = "run",
        *,
        rewinds: bool = False,
        every: int = 0,
        cluster: LocalCluster | None = None,
    ) -> None:
        self.job, self.run, self._rewinds, self._every = job, run, rewinds, every
        self.cluster = cluster or LocalCluster()
        self._clients: list[RemoteTables] = []
        self.replicated = job.embeddings is not None and job.embeddings.replication > 1
        names = [f"embedding-server-{number}" for number in range(_tables_servers(job))]
        self._made: dict[str, Actor] = {}  #: every server that ever was
        self.nodes = tuple(self._make_node(name) for name in names)
        self._keeping = self.nodes
        self.manager: Actor | None = None
        if self.replicated:
            self.make_manager(adopts=False)

    def make_manager(self, *, adopts: bool = True) -> None:
        """Make a manager; `adopts`: the servers have had another one before."""

        def make(transport: LocalTransport) -> ServerManager:
            who = "table-manager", self.job, self.run, int(adopts), dict[str, Any](), Roles()
            tables = dict(self._made)
            return ServerManager(*who, tables=tables, adopts=adopts, transport=transport)

        self.manager = self.cluster.spawn("table-manager", HERE, make)
        _give_controller(self.cluster, self.manager, self._make_node)

    def _make_node(self, name: str) -> Actor:
        index, limit_s = int(name.rpartition("-")[2]), self.job.failure.step_timeout_s
        part = TablePart(name, index, self.replicated, limit_s)
        node = self.cluster.spawn(name, HERE, partial(ServerNode, name, tables=part))
        self._made[name] = node
        return node

    @property
    def table_servers(self) -> list[TableServer]:
        """The servers that keep the tables, without their nodes: now, or at the end."""
        self._look_who_keeps()
        return [node.body.serving.server for node in self._keeping]

    def _look_who_keeps(self) -> None:
        if self.manager is not None and not self.manager.died:
            self._keeping = tuple(self.manager.body.table_servers(0, 0.0).servers)

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
        Give a worker's way to the servers.

        Args:
            rank: the worker's.
            attempt: of the run.
            node: the worker's; `ELSEWHERE`: it shares no memory with the servers.
            job: of the attempt, where it has another number of workers.
            saved: the checkpoint that the run began from.
            abandoned: once set, waits end.
        """
        transport = self.cluster.transport(node, f"worker-{rank}")
        handle = None
        if saved is not None:
            names = zip(saved.table_files, saved.tables(), strict=True)
            files = {name: [transport.put(dict(tables))] for name, tables in names}
            handle = SavedHandle(dict(saved.state), files)
        order = order_of(
            job or self.job,
            self.run,
            rank,
            attempt,
            manager=self.manager,
            embedding_servers=self.nodes,
            saved=handle,
            rewinds=self._rewinds,
        )
        found = RemoteTables(transport, order, self._every, abandoned or threading.Event())
        self._clients.append(found)
        return found

    def close(self) -> None:
        """End all; what they kept can still be looked at."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self.manager is not None:
            with suppress(DistplatError):  # one was lost for good
                self._look_who_keeps()
            self.manager.die("the run is over")  # before it sees its servers go
        self.cluster.close()


class Servers:
    """
    Parameter servers and their manager, for one run.

    Args:
        job: the run's job.
        roles: what its strategy needs; at least one server is made.
        run: its name.
        speeds: of the servers, in elements per second, by which shards are cut; empty: evenly.
        cluster: where they live; None: one of their own.
        backups: the node of those that are made while the run goes on.
    """

    def __init__(
        self,
        job: Job,
        roles: Roles,
        run: str = "run",
        *,
        speeds: Sequence[float] = (),
        cluster: LocalCluster | None = None,
        backups: str = HERE,
    ) -> None:
        self.job, self.run = job, run
        self.cluster = cluster or LocalCluster()
        self.roles = replace(roles, split_by_load=bool(speeds), servers=max(1, roles.servers))
        self._division = self.roles.division(job.scaling.world)
        self._clients: list[RemoteShards] = []
        self.nodes = {
            name: self.cluster.spawn(name, HERE, partial(ServerNode, name))
            for name in (f"server-{number}" for number in range(self.roles.servers))
        }
        for node, speed in zip(self.nodes.values(), speeds, strict=False):
            node.body.speed = partial(_speed, speed)
        self.manager = self.cluster.spawn("server-manager", HERE, self._make_manager)
        self._backups = backups
        if self.roles.replication > 1:
            _give_controller(self.cluster, self.manager, self._make_backup)

    def _make_manager(self, transport: LocalTransport) -> ServerManager:
        who = "server-manager", self.job, self.run, 0, dict(self.nodes)
        return ServerManager(*who, self.roles, transport=transport)

    def _make_backup(self, name: str) -> Actor:
        node = self.nodes[name] = self.cluster.spawn(name, self._backups, partial(ServerNode, name))
        return node

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
        Give a worker's way to the servers of its part of the model.

        Args:
            rank: the worker's.
            total_steps: updates in the run.
            attempt: of the run.
            every: steps between two checkpoints; 0: there are none.
            node: the worker's; `ELSEWHERE`: it shares no memory with the servers.
            job: of the attempt, where it has another number of workers.
            abandoned: once set, waits end.
        """
        order = order_of(job or self.job, self.run, rank, attempt, manager=self.manager)
        transport = self.cluster.transport(node, f"worker-{rank}")
        shards = RemoteShards(transport, order, total_steps, every, abandoned)
        self._clients.append(shards)
        return shards

    def shard_server(self, shard: int, part: int = 0) -> ShardServer:
        """Give a shard's server itself, without its node; only once a worker has joined."""
        number = self._division.servers_of(part)[shard]
        server: ShardServer = self.nodes[f"server-{number}"].body.serving.server
        return server

    def shard_servers(self, part: int = 0) -> list[ShardServer]:
        """Give those of all shards of a part of the model."""
        return [self.shard_server(shard, part) for shard in range(self._division.each)]

    def cuts(self, part: int = 0) -> list[Shard | None]:
        """Give which run of the vector each shard of a part is."""
        numbers = self._division.servers_of(part)
        return [self.nodes[f"server-{number}"].body.held().cut for number in numbers]

    def logs(self) -> list[NDArray[np.int64]]:
        """Give each shard's order of updates, where there is one to tell; see `apply_log`."""
        found = [server.store.log() for server in self.shard_servers()]
        return [log for log in found if log is not None]

    def renew(self, attempt: int, world: int | None = None) -> None:
        """Begin a later attempt: who waits at the servers is told that theirs is over."""
        for node in self.nodes.values():
            server: ShardServer | None = node.body.serving.server
            if server is not None:
                server.exclusively(partial(server.renew, attempt, world))

    def end_attempt(self) -> None:
        """Have all workers leave that came so far."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    def close(self) -> None:
        """End all; what they kept can still be looked at."""
        self.end_attempt()
        self.manager.die("the run is over")  # before it sees its servers go
        self.cluster.close()


def order_of(job: Job, run: str, rank: int, attempt: int = 0, **more: Any) -> WorkOrder:
    """Make the orders of a worker that is a thread here: as far as ports read them."""
    fields = {"task": "", "search_path": "", "strategy_file": None, "collective": None}
    return WorkOrder(job, run, attempt, rank, **{"manager": None, **fields, **more})


class _ServerMaker:
    """Makes the servers that a manager asks for, as the controller of a run on Ray does."""

    def __init__(self, make: Callable[[str], Actor]) -> None:
        self._make, self._made = make, dict[str, Actor]()
        self._making = threading.Lock()

    def make_server(self, attempt: int, server: str, beside: str) -> Actor:
        """Make a server node, once for each name; `ActorGroup` makes one on a cluster."""
        with self._making:
            if server not in self._made:
                self._made[server] = self._make(server)
            return self._made[server]


def _give_controller(cluster: LocalCluster, manager: Actor, make: Callable[[str], Actor]) -> None:
    """Have a manager's new servers made by `make`."""
    controller = cluster.spawn("controller", HERE, lambda _: _ServerMaker(make))
    manager.body.begin(controller)


def _tables_servers(job: Job) -> int:
    return job.embeddings.servers if job.embeddings is not None else 0


def _speed(speed: float, job: Job, world: int, dtype: str) -> float:
    return speed
