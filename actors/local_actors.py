"""
Servers, their manager and the task scheduler in the calling process, without Ray.

They are the same classes as on Ray, over `LocalTransport`. There are no backups, because a backup
in the same process would be lost together with its primary. `num_workers: 0` uses these actors, and
so do tests, with threads as ranks and with backups (`tests/support/local_servers.py`).
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
    Some actors of a run, and the workers' clients of these actors.

    Args:
        job: job of the run.
        run: name of the run.
    """

    def __init__(self, job: Job, run: str) -> None:
        self.job, self.run = job, run
        self.cluster = LocalCluster()
        self._clients: list[RemoteShards | RemoteTables | RemoteLeases] = []

    def _keep(self, client: Client) -> Client:
        """Register a client that `end_attempt` closes."""
        self._clients.append(client)
        return client

    def end_attempt(self) -> None:
        """Close the clients of all workers."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    def close(self) -> None:
        """End all actors; their state can still be read."""
        self.end_attempt()
        self.cluster.close()


class LocalTaskScheduler(_Actors):
    """
    The task scheduler of one run.

    Args:
        job: job of the run.
        roles: roles of the strategy.
        run: name of the run.
    """

    def __init__(self, job: Job, roles: Roles, run: str = "run") -> None:
        super().__init__(job, run)
        self.consistency = roles.consistency
        self.scheduler = self.cluster.spawn("task-scheduler", HERE, self._create)

    def _create(self, transport: LocalTransport) -> Scheduler:
        return Scheduler("task-scheduler", self.job, self.consistency)

    def leases(self, rank: int) -> RemoteLeases:
        """Create a worker's client of the scheduler."""
        order = order_of(self.job, self.run, rank, scheduler=self.scheduler)
        transport, eager = (
            self.cluster.transport(HERE, f"worker-{rank}"),
            self.consistency.bound is not None,
        )
        return self._keep(RemoteLeases(transport, order, eager, threading.Event()))

    def call(self, method: str, *args: Any) -> Any:
        """Call the scheduler and wait for its answer."""
        transport = self.cluster.transport()
        limit_s = self.job.failure.start_timeout_s
        return transport.get(transport.call(self.scheduler, method, *args), limit_s)


class TableServers(_Actors):
    """
    Embedding servers of one run; none if the job has no `embeddings`.

    Args:
        job: job of the run.
        run: name of the run.
        every: steps between checkpoints; 0: checkpoints are disabled.
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
        """The `TableServer` of each node; also valid after `close`."""
        return [node.body.serving.server for node in self.nodes]

    def tables(self, rank: int, *, saved: SavedState | None = None) -> RemoteTables:
        """Create a worker's client of the servers; `saved`: the checkpoint to start from."""
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
        job: job of the run.
        roles: roles of the strategy; at least one server is created.
        run: name of the run.
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
        Create a worker's client of the servers of its part of the model.

        Args:
            rank: rank of the worker.
            total_steps: updates in the run.
            every: steps between checkpoints; 0: checkpoints are disabled.
        """
        order = order_of(self.job, self.run, rank, manager=self.manager)
        transport, abandoned = self.cluster.transport(HERE, f"worker-{rank}"), threading.Event()
        return self._keep(RemoteShards(transport, order, total_steps, every, abandoned))

    def shard_server(self, shard: int, part: int = 0) -> ShardServer:
        """Return the `ShardServer` of a shard, after a worker has joined."""
        number = self.division.servers_of(part)[shard]
        server: ShardServer = self.nodes[f"server-{number}"].body.serving.server
        return server

    def logs(self) -> list[NDArray[np.int64]]:
        """Return the log of updates of each shard that has one; see `apply_log`."""
        stores = [self.shard_server(shard).store for shard in range(self.division.servers_per_part)]
        return [log for store in stores if (log := store.log()) is not None]

    @override
    def close(self) -> None:
        self.end_attempt()
        self.manager.die(
            "the run is over"
        )  # before its servers end, or it would report them as lost
        super().close()


def order_of(job: Job, run: str, rank: int, attempt: int = 0, **more: Any) -> WorkOrder:
    """Create the order of a worker that is a thread here, with the fields that clients read."""
    fields = {"task": "", "search_path": "", "strategy_file": None, "collective": None}
    return WorkOrder(job, run, attempt, rank, **{"manager": None, **fields, **more})


def handle_of(saved: SavedState | None, transport: LocalTransport) -> SavedHandle | None:
    """Put a checkpoint's tables into the transport's store; None: there is no checkpoint."""
    if saved is None:
        return None
    names = zip(saved.table_files, saved.tables(), strict=True)
    files = {name: [transport.put(dict(tables))] for name, tables in names}
    return SavedHandle(dict(saved.state), files)
