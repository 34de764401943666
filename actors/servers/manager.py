"""
What Ray sees of the server manager: it owns the shard map, gives out the shards, watches the nodes.

The class is plain; `spawn.py` makes an actor of it. Where every shard is kept twice, a caretaker
replaces lost servers (`caretaker.py`); else the first loss is the end of the attempt.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from distplat.actors.asking import Call, ask
from distplat.actors.logs import log_to_stderr
from distplat.actors.messages import Address, Membership, ModelFacts
from distplat.actors.servers.caretaker import Caretaker
from distplat.platform.errors import ActorLost, DistplatError, ProtocolError
from distplat.platform.part import Role
from distplat.platform.server_group import Seat
from distplat.platform.shard_map import Shard, ShardMap, ShardPlan, cut_shards
from distplat.platform.spec import Job
from distplat.strategies.base import Roles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServersSeen:
    """The server group, as it is shown."""

    version: int
    """Of the shard map; 0: no shard was given out yet."""
    cuts: tuple[Shard, ...]
    seats: tuple[Seat, ...]
    """By shard, who keeps it."""
    replicated: bool


WATCH_S = 0.5
"""Period of the manager's look at its server nodes."""


class ServerManager:
    """
    See the top of the file.

    Args:
        name: of the actor.
        job: the run's job.
        run: its name.
        attempt: its generation.
        servers: handles of the server nodes; the n-th keeps shard n.
        roles: when they apply gradients, and how often each shard is kept.
        make: makes one more server node; see `Make` of `caretaker.py`.
    """

    def __init__(
        self,
        name: str,
        job: Job,
        run: str,
        attempt: int,
        servers: list[Any],
        roles: Roles,
        make: Callable[[str, str], Any],
    ) -> None:
        self._name, self._job, self._run, self._attempt = name, job, run, attempt
        self._servers, self._roles = servers, roles
        self._joining = threading.Lock()
        self._facts: ModelFacts | None = None
        self._membership: Membership | None = None
        self._lost: DistplatError | None = None
        self._losing = threading.Event()  #: a server was lost for good
        self._assigned = threading.Event()
        self._caretaker: Caretaker | None = None
        if roles.replication > 1:
            self._caretaker = Caretaker(servers, job.failure, make, self._assign_backup)
        else:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def poll(self, hold_s: float) -> DistplatError | None:
        """Tell the controller which server was lost for good; `hold_s`: see `Worker.poll`."""
        self._losing.wait(hold_s)
        if self._caretaker is not None and self._caretaker.lost is not None:
            return _lost_for_good(self._caretaker.lost)
        return self._lost

    def join(self, rank: int, facts: ModelFacts) -> Membership:
        """
        Take a worker in. The first to come has the shards assigned.

        Raises:
            ProtocolError: the worker's model is not that of the others.
            DeadlineExceeded: a server node did not take its shard.
        """
        with self._joining:
            if self._membership is None or self._facts is None:
                self._facts, self._membership = facts, self._assign(facts)
                self._assigned.set()
        if facts != self._facts:
            raise ProtocolError(
                f"rank {rank} built another model or data set than the first rank to come: "
                f"{facts} against {self._facts}; model() must not depend on the process"
            )
        return self._present()

    def follow(self, version: int, limit_s: float) -> Membership | None:
        """
        Wait for a newer map than a worker has; None: there is none yet.

        Raises:
            ActorLost: a server was lost with all that it kept.
        """
        caretaker = self._caretaker
        assert caretaker is not None, "only a group whose shards are kept twice has newer maps"
        if not caretaker.wait_past(version, limit_s):
            return None
        if caretaker.lost is not None:
            raise _lost_for_good(caretaker.lost)
        return self._present()

    def seats(self) -> list[Seat]:
        """Tell who keeps which shard; empty where no shard is kept twice."""
        return [] if self._caretaker is None else self._caretaker.seats()

    def seen(self) -> ServersSeen:
        """Tell who keeps which shard, for those who look."""
        count, first = len(self._servers), self._membership
        seats = self.seats() or [Seat(index, f"server-{index}") for index in range(count)]
        if first is None:
            return ServersSeen(0, (), tuple(seats), self._caretaker is not None)
        cuts = self._present().shard_map
        return ServersSeen(cuts.version, cuts.shards, tuple(seats), self._caretaker is not None)

    def _present(self) -> Membership:
        """Give the map as it is now."""
        first, caretaker = self._membership, self._caretaker
        assert first is not None, "somebody has joined"
        if caretaker is None:
            return first
        version, names = caretaker.primaries()
        cuts = ShardMap(version, first.shard_map.total, first.shard_map.shards)
        addresses = [
            caretaker.address(name) or first.parameters[index] for index, name in enumerate(names)
        ]
        handles = [caretaker.handles[name] for name in names]
        return replace(first, shard_map=cuts, servers=handles, names=names, parameters=addresses)

    def _assign(self, facts: ModelFacts) -> Membership:
        """Give out the shards; the first server on each node makes the node's segment."""
        everybody = list(range(len(self._servers)))
        self._cuts = cuts = self._cut(facts, everybody)
        nodes = self._ask(everybody, [server.where.remote for server in self._servers])
        # A shard that is kept twice has memory of its own, which lives as long as its server.
        homes = nodes if self._caretaker is None else everybody
        first_at = {home: homes.index(home) for home in homes}
        made = self._assign_some(facts, list(first_at.values()), [None] * len(first_at))
        segments = dict(zip(first_at, made, strict=True))
        others = [i for i in everybody if i not in first_at.values()]
        self._assign_some(facts, others, [segments[homes[i]] for i in others])
        addresses = [segments[home] for home in homes]
        names = [f"server-{index}" for index in everybody]
        return Membership(
            cuts,
            self._servers,
            names,
            addresses,
            self._roles.consistency.private,
            self._roles.wire,
            replicated=self._caretaker is not None,
        )

    def _cut(self, facts: ModelFacts, everybody: list[int]) -> ShardMap:
        """Cut the vector: evenly, or as fast as the servers are when all measure at once."""
        speeds = []
        if self._roles.split_by_load:
            job, world = self._job, self._job.scaling.world
            calls = [partial(s.speed.remote, job, world, facts.dtype) for s in self._servers]
            speeds = self._ask(everybody, calls)
        cuts = cut_shards(facts.size, len(everybody), speeds=speeds)
        if speeds:
            log_to_stderr()
            told = [
                f"{speed / 1e6:.0f} M/s: {cut.size}"
                for speed, cut in zip(speeds, cuts.shards, strict=True)
            ]
            logger.info("elements by the servers' speed: %s", ", ".join(told))
        return cuts

    def _assign_some(
        self, facts: ModelFacts, indices: list[int], segments: list[Any]
    ) -> list[Address]:
        role = Role.ALONE if self._caretaker is None else Role.WAITING
        calls = [
            self._assignment(self._servers[i], facts, i, segment, role)
            for i, segment in zip(indices, segments, strict=True)
        ]
        return self._ask(indices, calls)

    def _assignment(
        self, server: Any, facts: ModelFacts, shard: int, segment: Any, role: Role
    ) -> Call:
        job, shards = self._job, len(self._servers)
        plan = ShardPlan(
            job,
            self._run,
            self._attempt,
            job.scaling.world,
            facts.total_steps,
            shards,
            self._roles.consistency,
            checkpoint_every=facts.checkpoint_every,
            wire=self._roles.wire,
        )
        cut = self._cuts.shards[shard]
        return partial(server.assign.remote, plan, cut, facts.size, facts.dtype, segment, role)

    def _assign_backup(self, server: Any, shard: int) -> Address:
        """Give a backup its shard, once a worker has told what the model is."""
        self._assigned.wait()
        assert self._facts is not None, "a worker has joined"
        call = self._assignment(server, self._facts, shard, None, Role.BACKUP)
        limit = self._job.failure.start_timeout_s
        names = [f"a backup of shard {shard}"]
        address: Address = ask("assigning a backup", [call], names, limit, "start_timeout_s")[0]
        return address

    def _ask(self, indices: list[int], calls: Sequence[Call]) -> list[Any]:
        names = [f"server-{index}" for index in indices]
        limit = self._job.failure.start_timeout_s
        return ask("assigning shards", calls, names, limit, "start_timeout_s")

    def logs(self) -> list[NDArray[np.int64]]:
        """Give the shards' orders of updates, where they are kept; none from a lost server."""
        if self._membership is None:
            return []
        servers = self._present().servers
        logs = self._ask(list(range(len(servers))), [server.log.remote for server in servers])
        return [log for log in logs if log is not None]

    def _watch(self) -> None:
        """Note the first server that dies; the controller asks for it by `poll`."""
        heard = dict.fromkeys(range(len(self._servers)), time.monotonic())
        while self._lost is None:
            for index in heard:
                self._lost = self._lost or self._look(index, heard)
            if self._lost is not None:
                self._losing.set()
            self._losing.wait(WATCH_S)

    def _look(self, index: int, heard: dict[int, float]) -> DistplatError | None:
        """Ask one server whether it lives; `heard`: when each last said so."""
        limit = self._job.failure.heartbeat_timeout_s
        name = f"server-{index}"
        try:
            ray.get(self._servers[index].where.remote(), timeout=limit)
        except ray.exceptions.ActorUnavailableError as error:
            if time.monotonic() - heard[index] > limit:  # one lost answer is no lost server
                return ActorLost(name, None, _first_line(error))
            return None
        except ray.exceptions.RayActorError as error:
            return ActorLost(name, None, _first_line(error))
        except ray.exceptions.GetTimeoutError:
            cause = f"it has not answered for {limit:g} s (frozen or cut off)"
            return ActorLost(name, None, cause)
        heard[index] = time.monotonic()
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _lost_for_good(server: str) -> ActorLost:
    return ActorLost(server, None, "no other server has what it kept: its backup was not there yet")
