"""
The actors of a run in the calling process: servers, their manager, the task scheduler. No Ray.

They are those of a run on Ray, over `LocalTransport`, without backups: one in the same process
would be lost with what it backs. `num_workers: 0` trains with them, and so do tests, which make
ranks of threads, and backups (`tests/support/local_servers.py`).
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from distplat.actors.local_transport import Actor, LocalCluster, LocalTransport
from distplat.actors.messages import SavedHandle, TablePart, WorkOrder
from distplat.actors.servers.leases import RemoteLeases
from distplat.actors.servers.manager import ServerManager
from distplat.actors.servers.node import ServerNode
from distplat.actors.servers.scheduler import Scheduler
from distplat.actors.servers.shards import RemoteShards
from distplat.actors.servers.tables import RemoteTables
from distplat.platform.spec import Job
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.server.server import ShardServer
from distplat.strategies.server.table_store import TableServer
from distplat.strategies.strategy_spec import Roles

HERE = "node-0"
Client = TypeVar("Client", RemoteShards, RemoteTables, RemoteLeases)


class _Actors:
    """
    Some actors of a run, and what workers have to reach them.

    Args:
        job: the run's job.
        run: its name.
    """

    def __init__(self, job: Job, run: str) -> None:
        self.job, self.run = job, run
        self.cluster = LocalCluster()
        self._clients: list[RemoteShards | RemoteTables | RemoteLeases] = []

    def _keep(self, client: Client) -> Client:
        """Note what is to be closed."""
        self._clients.append(client)
        return client

    def end_attempt(self) -> None:
        """Close the clients of all workers that came so far."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    def close(self) -> None:
        """End all; what they kept can still be looked at."""
        self.end_attempt()
        self.cluster.close()


class LocalTaskScheduler(_Actors):
    """
    The task scheduler of one run.

    Args:
        job: the run's job.
        roles: what its strategy needs.
        run: its name.
    """

    def __init__(self, job: Job, roles: Roles, run: str = "run") -> None:
        super().__init__(job, run)
        self.how = roles.consistency
        self.scheduler = self.cluster.spawn("task-scheduler", HERE, self._make)

    def _make(self, transport: LocalTransport) -> Scheduler:
        return Scheduler("task-scheduler", self.job, self.how)

    def leases(self, rank: int) -> RemoteLeases:
        """Give a worker's way to it."""
        order = order_of(self.job, self.run, rank, scheduler=self.scheduler)
        transport, eager = (
            self.cluster.transport(HERE, f"worker-{rank}"),
            self.how.bound is not None,
        )
        return self._keep(RemoteLeases(transport, order, eager, threading.Event()))

    def call(self, method: str, *args: Any) -> Any:
        """Call the scheduler, and wait for its answer."""
        transport = self.cluster.transport()
        limit_s = self.job.failure.start_timeout_s
        return transport.get(transport.call(self.scheduler, method, *args), limit_s)


class TableServers(_Actors):
    """
    Servers of embedding tables, for one run.

    Args:
        job: the run's job; has the field `embeddings`, or there are none.
        run: its name.
        every: steps between two checkpoints; 0: there are none.
    """

    def __init__(self, job: Job, run: str = "run", *, every: int = 0) -> None:
        super().__init__(job, run)
        self._every = every
        numbers = range(job.embeddings.servers if job.embeddings is not None else 0)
        self.nodes = tuple(self._make_node(f"embedding-server-{number}") for number in numbers)

    def _make_node(self, name: str) -> Actor:
        part = TablePart(name, int(name.rpartition("-")[2]))
        return self.cluster.spawn(name, HERE, partial(ServerNode, name, tables=part))

    @property
    def table_servers(self) -> list[TableServer]:
        """The servers that keep the tables, without their nodes: now, or at the end."""
        return [node.body.serving.server for node in self.nodes]

    def tables(self, rank: int, *, saved: SavedState | None = None) -> RemoteTables:
        """Give a worker's way to the servers; `saved`: what the run began from."""
        transport = self.cluster.transport(HERE, f"worker-{rank}")
        order = order_of(
            self.job,
            self.run,
            rank,
            embedding_servers=self.nodes,
            saved=handle_of(saved, transport),
        )
        return self._keep(RemoteTables(transport, order, self._every, threading.Event()))


class Servers(_Actors):
    """
    Parameter servers and their manager, for one run.

    Args:
        job: the run's job.
        roles: what its strategy needs; at least one server is made.
        run: its name.
    """

    def __init__(self, job: Job, roles: Roles, run: str = "run") -> None:
        super().__init__(job, run)
        self.roles = replace(roles, servers=max(1, roles.servers))
        self.division = self.roles.division(job.scaling.world)
        self.nodes: dict[str, Actor] = {}
        for number in range(self.roles.servers):
            self._make_node(f"server-{number}")
        arguments = "server-manager", job, run, 0, dict(self.nodes), self.roles
        self.manager = self.cluster.spawn(
            arguments[0], HERE, lambda transport: ServerManager(*arguments, transport=transport)
        )

    def _make_node(self, name: str, node: str = HERE) -> Actor:
        self.nodes[name] = self.cluster.spawn(name, node, partial(ServerNode, name))
        return self.nodes[name]

    def shards(self, rank: int, total_steps: int, *, every: int = 0) -> RemoteShards:
        """
        Give a worker's way to the servers of its part of the model.

        Args:
            rank: the worker's.
            total_steps: updates in the run.
            every: steps between two checkpoints; 0: there are none.
        """
        order = order_of(self.job, self.run, rank, manager=self.manager)
        transport, abandoned = self.cluster.transport(HERE, f"worker-{rank}"), threading.Event()
        return self._keep(RemoteShards(transport, order, total_steps, every, abandoned))

    def shard_server(self, shard: int, part: int = 0) -> ShardServer:
        """Give a shard's server itself, without its node; only once a worker has joined."""
        number = self.division.servers_of(part)[shard]
        server: ShardServer = self.nodes[f"server-{number}"].body.serving.server
        return server

    def logs(self) -> list[NDArray[np.int64]]:
        """Give each shard's order of updates, where there is one to tell; see `apply_log`."""
        stores = [self.shard_server(shard).store for shard in range(self.division.servers_per_part)]
        return [log for store in stores if (log := store.log()) is not None]

    @override
    def close(self) -> None:
        self.end_attempt()
        self.manager.die("the run is over")  # before it sees its servers go
        super().close()


def order_of(job: Job, run: str, rank: int, attempt: int = 0, **more: Any) -> WorkOrder:
    """Make the orders of a worker that is a thread here: as far as ports read them."""
    fields = {"task": "", "search_path": "", "strategy_file": None, "collective": None}
    return WorkOrder(job, run, attempt, rank, **{"manager": None, **fields, **more})


def handle_of(saved: SavedState | None, transport: LocalTransport) -> SavedHandle | None:
    """Put a checkpoint's tables where servers get them; None: there is no checkpoint."""
    if saved is None:
        return None
    names = zip(saved.table_files, saved.tables(), strict=True)
    files = {name: [transport.put(dict(tables))] for name, tables in names}
    return SavedHandle(dict(saved.state), files)
