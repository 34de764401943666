"""
The actor class of the server manager: owns the server maps and watches the servers.

The manager splits the parameter vector and assigns the shards. Of replicated embedding tables it
maps parts to servers; the part of a row follows from the row's id.

A model that is split into parts has separate servers for each part (`Division`), which do not know
of each other; the manager watches all of them.

The class is plain; `spawn.py` makes an actor of it. If shards, or parts of the tables, are
replicated, a replication manager replaces lost servers (`replication_manager.py`). If not, the
first loss of a shard's server ends the attempt, and the controller detects lost table servers.

An actor ends with the process that created it. So the controller creates servers, not the manager:
they survive the loss of the manager.

    replication manager ── make ──▶ provisioning ── make_server ──▶ controller ── spawn ──▶ server-4
        ◀────── handle ──────┘ ◀───────── handle ───────┘

A restarted manager queries the servers for their shards and roles: it has no other state.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

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
    Take over the servers of a lost manager, and kill the superfluous ones; see `ServerGroup.adopt`.

    Args:
        transport: the manager's.
        group: a new one.
        servers: handles of all servers created so far, by name.
        generation: number of earlier managers.
        limit_s: deadline of a server's answer.

    Returns:
        Reports of the servers that answered in time.
    """
    calls = {transport.call(server, "held"): name for name, server in servers.items()}
    reports = []
    for call in transport.wait(list(calls), limit_s, everything=True):
        try:
            reports.append(replace(transport.get(call, limit_s), server=calls[call]))
        except TransportError as error:
            logger.warning("%s: %s", calls[call], error)
    reports.sort(key=lambda report: report.server)
    for superfluous in group.adopt(reports, servers, generation):
        logger.info("%s is not needed any more", superfluous)
        transport.kill(servers[superfluous])
    return reports


_SETTING = "start_timeout_s"


class ServerManager:
    """
    Server manager: assigns shards, and sends workers the map of the servers.

    Args:
        name: of the actor.
        job: the run's job.
        run: name of the run.
        attempt: of the run.
        servers: handles of the server nodes by name; initially `server-n` has shard n, and the
            servers of part 0 come first.
        roles: consistency and replication of the servers.
        tables: handles of the servers of embedding tables by name, if tables are replicated;
            initially `embedding-server-n` has part n.
        adopts: whether the servers belonged to an earlier manager.
        transport: for calls to other actors; None: Ray's, for an actor with its own process.
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
        self._first_maps: dict[int, Membership] = {}  #: by part: the initial map
        self._cuts: dict[int, ShardMap] = {}  #: by part
        self._assigned = [threading.Event() for _ in self._division.parts]
        self._replication: ReplicationManager | None = None
        self._health: HealthCheck | None = None
        self._losing = threading.Event()  #: set once a server is lost that no backup replaces
        limit = job.failure.start_timeout_s
        self._provisioning = ServerProvisioning(self._transport, attempt, limit)
        self._tables = self._replicate_tables(tables or {}, adopts=adopts)
        group, limit = ServerGroup(roles.servers), job.failure.heartbeat_timeout_s
        adopting = adopts and servers
        reports = adopt(self._transport, group, servers, attempt, limit) if adopting else []
        self._old_cuts = {report.shard: report.cut for report in reports if report.cut is not None}
        #: by shard: the initial primary
        self._servers = [servers[assignment.primary] for assignment in group.assignments]
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
        """Start the replication of embedding tables; None: the job has no replicated tables."""
        if not servers:
            return None
        assert self._job.embeddings is not None, "only jobs with embeddings have servers of tables"
        group = ServerGroup(self._job.embeddings.servers, "embedding-server")
        if adopts:
            limit = self._job.failure.heartbeat_timeout_s
            adopt(self._transport, group, servers, self._attempt, limit)
        make, limits = self._provisioning.make, self._job.failure
        # A backup of tables needs no assignment: the primary's snapshot says which part it has.
        assign = lambda server, part: None  # noqa: E731
        return ReplicationManager(
            self._transport, group, servers, limits, make, assign, self._losing
        )

    @override
    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def begin(self, controller: Any) -> None:
        """Set the handle of the controller, which creates servers; idempotent."""
        self._provisioning.begin(controller)

    def poll(self, number: int, hold_s: float) -> DistplatError | None:
        """
        Return the error of a lost server that no backup replaces; None: no such loss.

        Args:
            number: see `Worker.poll`; every poll gets the error.
            hold_s: see `Worker.poll`.
        """
        self._losing.wait(hold_s)
        watchers = (self._replication, self._tables, self._health)
        return next((w.lost for w in watchers if w is not None and w.lost), None)

    def table_servers(self, version: int, limit_s: float) -> TableMap | None:
        """
        Wait for a map of the tables' servers newer than the caller's; None: none yet.

        Args:
            version: of the caller's map; 0: it has none.
            limit_s: seconds to wait.

        Raises:
            ActorLost: a server was lost that no backup replaces.
        """
        assert self._tables is not None, "only replicated tables have a map"
        if not self._tables.wait_past(version, limit_s):
            return None
        if self._tables.lost is not None:
            raise self._tables.lost
        newest, names = self._tables.primaries()
        return TableMap(newest, [self._tables.handles[name] for name in names], names)

    def join(self, rank: int, facts: ModelFacts) -> Membership:
        """
        Register a worker. The first worker of a part of the model triggers its shard assignment.

        Raises:
            ProtocolError: the worker's model differs from that of the other workers.
            DeadlineExceeded: the assignment of a shard was not answered.
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
        Wait for a map newer than the worker's; None: none yet.

        Args:
            part: the worker's part of the model.
            part_rank: see `Membership`.
            version: of the worker's map.
            limit_s: seconds to wait.

        Raises:
            ActorLost: a server was lost that no backup replaces.
        """
        replication = self._replication
        assert replication is not None, "only replicated shards have newer maps"
        if not replication.wait_past(version, limit_s):
            return None
        if replication.lost is not None:
            raise replication.lost
        return self._membership(part, part_rank)

    def assignments(self) -> list[ShardAssignment]:
        """Return the servers of each shard; empty if shards are not replicated."""
        return [] if self._replication is None else self._replication.assignments()

    def table_assignments(self) -> list[ShardAssignment]:
        """Return the servers of each part of the tables; empty if tables are not replicated."""
        return [] if self._tables is None else self._tables.assignments()

    def seen(self) -> ServerGroupStatus:
        """Return the status of the server group, for `distplat status`."""
        count, replicated = len(self._servers), self._replication is not None
        tables = tuple(self.table_assignments())
        assignments = self.assignments() or [
            ShardAssignment(index, f"server-{index}") for index in range(count)
        ]
        if len(self._first_maps) < len(self._division.parts):
            return ServerGroupStatus(0, (), tuple(assignments), replicated, tables)
        maps = [self._membership(part, 0).shard_map for part in range(len(self._first_maps))]
        cuts = [cut for shard_map in maps for cut in shard_map.shards]
        shards = tuple(replace(cut, index=index) for index, cut in enumerate(cuts))
        return ServerGroupStatus(maps[0].version, shards, tuple(assignments), replicated, tables)

    def _membership(self, part: int, part_rank: int) -> Membership:
        """Return the current shard map of a part."""
        first = replace(self._first_maps[part], part_rank=part_rank)
        replication = self._replication
        if replication is None:
            return first
        version, primaries = replication.primaries()
        names = [primaries[index] for index in self._division.servers_of(part)]
        cuts = ShardMap(version, first.shard_map.total, first.shard_map.shards)
        addresses = [
            replication.address(name) or first.parameters[index] for index, name in enumerate(names)
        ]
        handles = [replication.handles[name] for name in names]
        return replace(first, shard_map=cuts, servers=handles, names=names, parameters=addresses)

    def _assign(self, part: int, facts: ModelFacts) -> Membership:
        """Assign a part's shards; the first server on each node creates the node's segment."""
        indices = list(self._division.servers_of(part))
        servers = [self._servers[i] for i in indices]
        self._cuts[part] = self._cut(facts, indices)
        nodes = self._ask(indices, [self._call(server, "where") for server in servers])
        # A replicated shard has its own segment, which lives as long as its server.
        hosts = nodes if self._replication is None else indices
        first_on = {host: indices[hosts.index(host)] for host in hosts}
        addresses = self._assign_shards(facts, list(first_on.values()), [None] * len(first_on))
        segments = dict(zip(first_on, addresses, strict=True))
        rest = [
            (i, segments[host])
            for i, host in zip(indices, hosts, strict=True)
            if i not in first_on.values()
        ]
        self._assign_shards(facts, [i for i, _ in rest], [segment for _, segment in rest])
        return Membership(
            part,
            0,
            self._cuts[part],
            servers,
            [f"server-{index}" for index in indices],
            [segments[host] for host in hosts],
            self._roles.consistency.private,
            self._roles.wire,
            part_world=None if len(self._division.parts) == 1 else len(self._division.parts[part]),
            replicated=self._replication is not None,
        )

    def _cut(self, facts: ModelFacts, indices: list[int]) -> ShardMap:
        """Split the vector evenly, or by the servers' speeds, measured on all at the same time."""
        adopted = [self._old_cuts[index] for index in indices if index in self._old_cuts]
        if len(adopted) == len(indices):
            return ShardMap(1, facts.size, tuple(adopted))
        speeds = []
        if self._roles.split_by_load and adopted:  # a second measurement would give other shards
            cause = "its manager was lost before every server had its shard"
            raise ActorLost(f"server-{indices[0]}", None, cause)
        if self._roles.split_by_load:
            job, world = self._job, self._job.scaling.world
            servers = [self._servers[i] for i in indices]
            dtype = facts.layout.segments[0].dtype if facts.layout is not None else facts.dtype
            calls = [self._call(server, "speed", job, world, dtype) for server in servers]
            speeds = self._ask(indices, calls)
        tail = facts.layout.tail_size if facts.layout is not None else 0
        boundaries = facts.layout.starts if facts.layout and self._job.optimizer.whole else ()
        cuts = cut_shards(facts.size, len(indices), speeds=speeds, tail=tail, boundaries=boundaries)
        if speeds:
            sizes = [
                f"{speed / 1e6:.0f} M/s: {cut.size}"
                for speed, cut in zip(speeds, cuts.shards, strict=True)
            ]
            logger.info("elements by the servers' speed: %s", ", ".join(sizes))
        return cuts

    def _assign_shards(
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
        schedule, job = facts.schedule, self._job
        plan = ShardPlan(
            job if schedule is None else job.with_schedule(schedule),
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
        """Assign a shard to a backup, once a worker has described the model."""
        part, _ = self._division.shard_of(shard)
        self._assigned[part].wait()  # if no worker joins, `start_timeout_s` ends the run
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
        """Return the shards' logs of updates, if they are recorded; none of lost servers."""
        if not self._first_maps:
            return []
        servers = self._membership(0, 0).servers  # models of several parts record no logs
        calls = [self._call(server, "log") for server in servers]
        logs = self._ask(list(range(len(servers))), calls)
        return [log for log in logs if log is not None]

    def close(self) -> None:
        """Stop watching the servers; the end of the process does the same."""
        if self._health is not None:
            self._health.close()
        for group in (self._replication, self._tables):
            if group is not None:
                group.close()


class ServerProvisioning:
    """
    Client of the controller for new servers.

    Args:
        transport: the manager's.
        attempt: of the manager; the controller refuses earlier attempts.
        limit_s: deadline for a new server.
    """

    def __init__(self, transport: Transport, attempt: int, limit_s: float) -> None:
        self._transport, self._attempt, self._limit_s = transport, attempt, limit_s
        self._controller: Any = None
        self._has_controller = threading.Event()
        self._calling = threading.Lock()  # concurrent calls would occupy the controller's threads

    def begin(self, controller: Any) -> None:
        """Set the controller's handle; idempotent. The first manager starts before it."""
        self._controller = controller
        self._has_controller.set()

    def make(self, server: str, beside: str) -> Any:
        """
        Let the controller create a server, and return its handle.

        Args:
            server: name of the server.
            beside: the node on which the server should preferably not run.

        Raises:
            DeadlineExceeded: the controller did not create the server.
            ActorLost: the controller is dead.
            FencedError: there is a later manager.
            NotReadyError: the controller has not started.
        """
        if not self._has_controller.wait(self._limit_s):
            setting = f"failure.{_SETTING}"
            raise DeadlineExceeded("a new server", ("controller",), self._limit_s, setting)
        args = self._attempt, server, beside
        call = partial(self._transport.call, self._controller, "make_server", *args)
        until = time.monotonic() + self._limit_s
        while True:
            try:
                with self._calling:
                    return ask(
                        self._transport,
                        "a new server",
                        {"controller": call},
                        self._limit_s,
                        _SETTING,
                    )[0]
            except NotReadyError:  # the controller's process has just started
                if time.monotonic() > until:
                    raise
                time.sleep(RETRY_PAUSE_S)
