"""
What Ray sees of the server manager: it owns the maps of who keeps what, and watches the nodes.

Of the parameters it cuts the vector and gives out the shards. Of embedding tables that are kept
twice it knows who keeps which part; which row is in which part follows from its id.

A model that is cut has servers of its own for each part (`Division`), which know nothing of the
others; the manager watches all of them.

The class is plain; `spawn.py` makes an actor of it. Where every shard, or every part of
the tables, is kept twice, a replication manager replaces lost servers (`replication_manager.py`);
else the first loss of a shard's server ends the attempt, and of a table's the controller hears.

An actor ends with the process that made it. So the controller makes servers, not the manager: a
manager that is lost takes none with it.

    replication manager ── make ──▶ provisioning ── make_server ──▶ controller ── spawn ──▶ server-4
        ◀────── handle ──────┘ ◀───────── handle ───────┘

A manager that follows a lost one asks the servers what they have: nothing
that it must know is anywhere else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from distplat.actors.messages import Membership, MemoryAddress, ModelFacts, TableMap
from distplat.actors.ray_transport import alone
from distplat.actors.retrying_calls import RETRY_PAUSE_S, Call, ask
from distplat.actors.servers.health_check import HealthCheck
from distplat.actors.servers.replication_manager import ReplicationManager
from distplat.actors.transport import Transport, TransportError
from distplat.platform.errors import (
    ActorLost,
    DeadlineExceeded,
    DistplatError,
    NotReadyError,
    ProtocolError,
)
from distplat.platform.server_group import (
    Role,
    ServerGroup,
    ServerGroupStatus,
    ServerReport,
    ShardAssignment,
)
from distplat.platform.shard_map import ShardMap, ShardPlan, clip_ranges, cut_shards
from distplat.platform.spec import Job
from distplat.strategies.strategy_spec import Roles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


logger = logging.getLogger(__name__)


def adopt(
    transport: Transport,
    group: ServerGroup,
    servers: Mapping[str, Any],
    generation: int,
    limit_s: float,
) -> list[ServerReport]:
    """
    Have a group take over from a manager that was lost; see `ServerGroup.adopt`.

    Args:
        transport: the manager's.
        group: a new one.
        servers: handles of all servers that were ever made, by name.
        generation: number of managers before.
        limit_s: how long a server may take to answer.

    Returns:
        What the servers say; those that are gone, or do not answer in time, are left out.
    """
    calls = {transport.call(server, "held"): name for name, server in servers.items()}
    reports = []
    for call in transport.wait(list(calls), limit_s, everything=True):
        try:
            reports.append(replace(transport.get(call, limit_s), server=calls[call]))
        except TransportError as error:
            logger.warning("%s: %s", calls[call], error)
    reports.sort(key=lambda one: one.server)
    for useless in group.adopt(reports, servers, generation):
        logger.info("%s is not needed any more", useless)
        transport.kill(servers[useless])
    return reports


_SETTING = "start_timeout_s"


class ServerManager:
    """
    The server manager: gives out shards, and tells workers who keeps what.

    Args:
        name: of the actor.
        job: the run's job.
        run: its name.
        attempt: its generation.
        servers: handles of the server nodes by name; at first `server-n` keeps shard n, and those
            of part 0 come first.
        roles: when they apply gradients, and how often each shard is kept.
        tables: handles of the servers of embedding tables by name, where each part is kept twice;
            at first `embedding-server-n` keeps part n.
        adopts: whether they have had another manager before.
        transport: its way to other actors; None: Ray's, in a process of its own.
    """

    def __init__(
        self,
        name: str,
        job: Job,
        run: str,
        attempt: int,
        servers: dict[str, Any],
        roles: Roles,
        *,
        tables: dict[str, Any] | None = None,
        adopts: bool = False,
        transport: Transport | None = None,
    ) -> None:
        self._transport = transport or alone()
        self._name, self._job, self._run, self._attempt = name, job, run, attempt
        self._roles = roles
        self._division = roles.division(job.scaling.world)
        self._joining = threading.Lock()
        self._facts: dict[int, ModelFacts] = {}  #: by part
        self._first_maps: dict[int, Membership] = {}  #: by part, the map as it was at first
        self._cuts: dict[int, ShardMap] = {}  #: by part
        self._assigned = [threading.Event() for _ in self._division.parts]
        self._replication: ReplicationManager | None = None
        self._health: HealthCheck | None = None
        self._losing = threading.Event()  #: a server is lost for good
        limit = job.failure.start_timeout_s
        self._provisioning = ServerProvisioning(self._transport, attempt, limit)
        self._tables = self._replicate_tables(tables or {}, adopts=adopts)
        group, limit = ServerGroup(roles.servers), job.failure.heartbeat_timeout_s
        held = adopt(self._transport, group, servers, attempt, limit) if adopts and servers else []
        self._old_cuts = {one.shard: one.cut for one in held if one.cut is not None}
        # As they were at first.
        self._servers = [servers[assigned.primary] for assigned in group.assignments]
        if roles.replication > 1:
            make, assign = self._provisioning.make, self._assign_backup
            self._replication = ReplicationManager(
                self._transport, group, servers, job.failure, make, assign, self._losing
            )
        elif servers:
            self._health = HealthCheck(self._transport, self._servers, limit, self._losing)

    def _replicate_tables(
        self, servers: dict[str, Any], *, adopts: bool
    ) -> ReplicationManager | None:
        """Keep the servers of embedding tables going; None: there are none, or without backups."""
        if not servers:
            return None
        assert self._job.embeddings is not None, "only such jobs have servers of tables"
        group = ServerGroup(self._job.embeddings.servers, "embedding-server")
        if adopts:
            limit = self._job.failure.heartbeat_timeout_s
            adopt(self._transport, group, servers, self._attempt, limit)
        make, limits = self._provisioning.make, self._job.failure
        # What a backup is to have, its primary tells it.
        nothing = lambda server, part: None  # noqa: E731
        return ReplicationManager(
            self._transport, group, servers, limits, make, nothing, self._losing
        )

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def begin(self, controller: Any) -> None:
        """Take the controller's handle, which makes new servers; idempotent."""
        self._provisioning.begin(controller)

    def poll(self, number: int, hold_s: float) -> DistplatError | None:
        """
        Tell the controller which server was lost for good; None: none was.

        Args:
            number: see `Worker.poll`; a loss is told to every question.
            hold_s: the same.
        """
        self._losing.wait(hold_s)
        watching = (self._replication, self._tables, self._health)
        return next((one.lost for one in watching if one is not None and one.lost), None)

    def table_servers(self, version: int, limit_s: float) -> TableMap | None:
        """
        Wait for a newer map of the tables' servers than one has; None: there is none yet.

        Args:
            version: of its map; 0: it has none.
            limit_s: seconds to wait.

        Raises:
            ActorLost: a server was lost with all that it kept.
        """
        assert self._tables is not None, "only tables that are kept twice have a map"
        if not self._tables.wait_past(version, limit_s):
            return None
        if self._tables.lost is not None:
            raise self._tables.lost
        newest, names = self._tables.primaries()
        return TableMap(newest, [self._tables.handles[name] for name in names], names)

    def join(self, rank: int, facts: ModelFacts) -> Membership:
        """
        Take a worker in. The first to come with a part of the model has its shards assigned.

        Raises:
            ProtocolError: the worker's model is not that of the others.
            DeadlineExceeded: a server node did not take its shard.
        """
        part = self._division.part_of(rank)
        with self._joining:
            if part not in self._first_maps:
                self._first_maps[part] = self._assign(part, facts)
                self._facts[part] = facts
                self._assigned[part].set()
                if self._health is not None and len(self._first_maps) == len(self._assigned):
                    self._health.begin()
        if facts != self._facts[part]:
            raise ProtocolError(
                f"rank {rank} built another model or data set than the first rank to come: "
                f"{facts} against {self._facts[part]}; model() must not depend on the process"
            )
        return self._membership(part, self._division.part_rank_of(rank))

    def follow(self, part: int, part_rank: int, version: int, limit_s: float) -> Membership | None:
        """
        Wait for a newer map than a worker has; None: there is none yet.

        Args:
            part: of the model, that the worker has.
            part_rank: see `Membership`.
            version: of its map.
            limit_s: seconds to wait.

        Raises:
            ActorLost: a server was lost with all that it kept.
        """
        replicas = self._replication
        assert replicas is not None, "only a group whose shards are kept twice has newer maps"
        if not replicas.wait_past(version, limit_s):
            return None
        if replicas.lost is not None:
            raise replicas.lost
        return self._membership(part, part_rank)

    def assignments(self) -> list[ShardAssignment]:
        """List the servers of each shard; empty where no shard is replicated."""
        return [] if self._replication is None else self._replication.assignments()

    def table_assignments(self) -> list[ShardAssignment]:
        """List the servers of each part of the tables; empty where none is replicated."""
        return [] if self._tables is None else self._tables.assignments()

    def seen(self) -> ServerGroupStatus:
        """Describe the server group, for `distplat status`."""
        count, replicated = len(self._servers), self._replication is not None
        tables = tuple(self.table_assignments())
        assignments = self.assignments() or [
            ShardAssignment(index, f"server-{index}") for index in range(count)
        ]
        if len(self._first_maps) < len(self._division.parts):
            return ServerGroupStatus(0, (), tuple(assignments), replicated, tables)
        maps = [self._membership(part, 0).shard_map for part in range(len(self._first_maps))]
        cuts = [cut for one in maps for cut in one.shards]
        shards = tuple(replace(cut, index=index) for index, cut in enumerate(cuts))
        return ServerGroupStatus(maps[0].version, shards, tuple(assignments), replicated, tables)

    def _membership(self, part: int, part_rank: int) -> Membership:
        """Give the present shard map of a part, with which a worker has joined."""
        first = replace(self._first_maps[part], part_rank=part_rank)
        replicas = self._replication
        if replicas is None:
            return first
        version, everybody = replicas.primaries()
        names = [everybody[server] for server in self._division.servers_of(part)]
        cuts = ShardMap(version, first.shard_map.total, first.shard_map.shards)
        addresses = [
            replicas.address(name) or first.parameters[index] for index, name in enumerate(names)
        ]
        handles = [replicas.handles[name] for name in names]
        return replace(first, shard_map=cuts, servers=handles, names=names, parameters=addresses)

    def _assign(self, part: int, facts: ModelFacts) -> Membership:
        """Give out a part's shards; its first server on each node makes the node's segment."""
        everybody = list(self._division.servers_of(part))
        servers = [self._servers[i] for i in everybody]
        self._cuts[part] = self._cut(facts, everybody)
        nodes = self._ask(everybody, [self._call(server, "where") for server in servers])
        # A shard that is kept twice has memory of its own, which lives as long as its server.
        hosts = nodes if self._replication is None else everybody
        first_at = {host: everybody[hosts.index(host)] for host in hosts}
        assignments = self._assign_some(facts, list(first_at.values()), [None] * len(first_at))
        segments = dict(zip(first_at, assignments, strict=True))
        others = [
            (i, segments[host])
            for i, host in zip(everybody, hosts, strict=True)
            if i not in first_at.values()
        ]
        self._assign_some(facts, [i for i, _ in others], [segment for _, segment in others])
        return Membership(
            part,
            0,
            self._cuts[part],
            servers,
            [f"server-{index}" for index in everybody],
            [segments[host] for host in hosts],
            self._roles.consistency.private,
            self._roles.wire,
            part_world=None if len(self._division.parts) == 1 else len(self._division.parts[part]),
            replicated=self._replication is not None,
        )

    def _cut(self, facts: ModelFacts, everybody: list[int]) -> ShardMap:
        """Cut the vector: evenly, or as fast as the servers are when all measure at once."""
        adopted = [self._old_cuts[number] for number in everybody if number in self._old_cuts]
        if len(adopted) == len(everybody):
            return ShardMap(1, facts.size, tuple(adopted))
        speeds = []
        if self._roles.split_by_load and adopted:  # they could not be cut in the same way again
            cause = "its manager was lost before every server had its shard"
            raise ActorLost(f"server-{everybody[0]}", None, cause)
        if self._roles.split_by_load:
            job, world = self._job, self._job.scaling.world
            servers = [self._servers[i] for i in everybody]
            dtype = facts.layout.segments[0].dtype if facts.layout is not None else facts.dtype
            calls = [self._call(server, "speed", job, world, dtype) for server in servers]
            speeds = self._ask(everybody, calls)
        tail = facts.layout.tail_size if facts.layout is not None else 0
        boundaries = facts.layout.starts if facts.layout and self._job.optimizer.whole else ()
        cuts = cut_shards(
            facts.size, len(everybody), speeds=speeds, tail=tail, boundaries=boundaries
        )
        if speeds:
            sizes = [
                f"{speed / 1e6:.0f} M/s: {cut.size}"
                for speed, cut in zip(speeds, cuts.shards, strict=True)
            ]
            logger.info("elements by the servers' speed: %s", ", ".join(sizes))
        return cuts

    def _assign_some(
        self, facts: ModelFacts, indices: list[int], segments: list[Any]
    ) -> list[MemoryAddress]:
        role = Role.ALONE if self._replication is None else Role.WAITING
        calls = [
            self._assignment(self._servers[i], facts, i, segment, role)
            for i, segment in zip(indices, segments, strict=True)
        ]
        return self._ask(indices, calls)

    def _assignment(
        self, server: Any, facts: ModelFacts, index: int, segment: Any, role: Role
    ) -> Call:
        part, shard = self._division.shard_of(index)
        cut, ranks = self._cuts[part].shards[shard], self._division.parts[part]
        own, job = facts.schedule, self._job
        plan = ShardPlan(
            job if own is None else job.with_schedule(own),
            self._run,
            self._attempt,
            len(ranks),
            facts.total_steps,
            len(self._servers),
            self._roles.consistency,
            checkpoint_every=facts.checkpoint_every,
            wire=self._roles.wire,
            workers=ranks if len(self._division.parts) > 1 else (),
            duplicate_ranges=clip_ranges(facts.duplicate_ranges, cut),
            number=index,
            layout=facts.layout and facts.layout.cut(cut.start, cut.stop),
            own_loop=facts.own_loop,
        )
        return self._call(server, "assign", plan, cut, facts.size, facts.dtype, segment, role)

    def _assign_backup(self, server: Any, shard: int) -> MemoryAddress:
        """Assign a backup its shard, once a worker has described the model."""
        part, _ = self._division.shard_of(shard)
        self._assigned[part].wait()  # where nobody comes, `start_timeout_s` ends the run and this
        call = self._assignment(server, self._facts[part], shard, None, Role.BACKUP)
        limit = self._job.failure.start_timeout_s
        calls, what = {f"a backup of shard {shard}": call}, "assigning a backup"
        address: MemoryAddress = ask(self._transport, what, calls, limit, _SETTING)[0]
        return address

    def _call(self, server: Any, method: str, *args: Any) -> Call:
        return partial(self._transport.call, server, method, *args)

    def _ask(self, indices: list[int], calls: Sequence[Call]) -> list[Any]:
        named = {f"server-{index}": call for index, call in zip(indices, calls, strict=True)}
        limit = self._job.failure.start_timeout_s
        return ask(self._transport, "assigning shards", named, limit, _SETTING)

    def logs(self) -> list[NDArray[np.int64]]:
        """Give the shards' orders of updates, where they are kept; none from a lost server."""
        if not self._first_maps:
            return []
        servers = self._membership(0, 0).servers  # a model that is cut keeps none
        logs = self._ask(list(range(len(servers))), [self._call(one, "log") for one in servers])
        return [log for log in logs if log is not None]

    def close(self) -> None:
        """Look after the servers no more; a process's end does as much."""
        if self._health is not None:
            self._health.close()
        for group in (self._replication, self._tables):
            if group is not None:
                group.close()


class ServerProvisioning:
    """
    The manager's way to new servers.

    Args:
        transport: the manager's.
        attempt: for which the manager was made; the controller refuses those before.
        limit_s: how long a server may take to come.
    """

    def __init__(self, transport: Transport, attempt: int, limit_s: float) -> None:
        self._transport, self._attempt, self._limit_s = transport, attempt, limit_s
        self._controller: Any = None
        self._begun = threading.Event()
        self._asking = threading.Lock()  # many questions at once would take all its threads

    def begin(self, controller: Any) -> None:
        """Take the controller's handle, which exists after the first manager; idempotent."""
        self._controller = controller
        self._begun.set()

    def make(self, server: str, beside: str) -> Any:
        """
        Have a server made; give its handle.

        Args:
            server: its name.
            beside: the node on which it should rather not be.

        Raises:
            DeadlineExceeded: nobody made it.
            ActorLost: the controller is gone.
            FencedError: there is a later manager.
            NotReadyError: the controller has not begun.
        """
        if not self._begun.wait(self._limit_s):
            setting = f"failure.{_SETTING}"
            raise DeadlineExceeded("a new server", ("controller",), self._limit_s, setting)
        who = self._attempt, server, beside
        calls = {"controller": partial(self._transport.call, self._controller, "make_server", *who)}
        until = time.monotonic() + self._limit_s
        while True:
            try:
                with self._asking:
                    return ask(self._transport, "a new server", calls, self._limit_s, _SETTING)[0]
            except NotReadyError:  # its process has just started
                if time.monotonic() > until:
                    raise
                time.sleep(RETRY_PAUSE_S)
