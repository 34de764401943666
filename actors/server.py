"""
What Ray sees of the server group: the server node and the server manager.

Both classes are plain; `spawn.py` makes actors of them. Neither imports torch here, so that the
driver may name them; a server node imports it while it is constructed, in its own process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from distplat.actors.asking import Call, ask
from distplat.actors.importing import quick_imports
from distplat.actors.messages import Address, Membership, ModelFacts
from distplat.platform.clocks import Consistency
from distplat.platform.errors import ActorLost, DistplatError, ProtocolError
from distplat.platform.ledger import Answer, PushId
from distplat.platform.shard_map import Shard, ShardMap, ShardPlan, cut_shards
from distplat.platform.spec import Job

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distplat.platform.pieces import Whole
    from distplat.strategies.ports import ShardCopy

WATCH_S = 0.5
"""Period of the manager's look at its server nodes."""


class ServerNode:
    """Keeps one shard of the parameters. See `Serving` for what each call does."""

    def __init__(self, name: str) -> None:
        with quick_imports():
            from distplat.actors.serving import Serving  # torch: here, not in the driver

        self._name = name
        self._body = Serving(name, ray.get_runtime_context().get_node_id())

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def where(self) -> str:
        """Give the id of this server's node; also the answer that says: alive."""
        return str(ray.get_runtime_context().get_node_id())

    def assign(
        self, plan: ShardPlan, shard: Shard, total: int, dtype: str, parameters: Address | None
    ) -> Address:
        """Take over a shard."""
        return self._body.assign(plan, shard, total, dtype, parameters)

    def attach(self, rank: int, gradients: Address, parameters: Address | None) -> bool:
        """Map a worker's segments."""
        return self._body.attach(rank, gradients, parameters)

    def restore(
        self, version: int, values: NDArray[np.uint8] | None, state: Mapping[str, Whole]
    ) -> None:
        """Open for service."""
        self._body.restore(version, values, state)

    def kept(self, version: int, limit_s: float) -> ShardCopy:
        """Give what was kept of a version for a checkpoint."""
        return self._body.kept(version, limit_s)

    def pull(self, rank: int, number: int) -> Answer:
        """Give the newest parameters."""
        return self._body.pull(rank, number)

    def push(self, push: PushId, values: NDArray[np.uint8] | None) -> Answer:
        """Take a gradient, wait for the other ranks where the strategy says so."""
        return self._body.push(push, values)

    def commit(self, rank: int, seq: int, norm: float | None) -> Answer:
        """Apply a staged step."""
        return self._body.commit(rank, seq, norm)

    def wait_for_all(self, limit_s: float) -> list[int]:
        """Wait a while for all ranks' last push."""
        return self._body.wait_for_all(limit_s)

    def log(self) -> NDArray[np.int64] | None:
        """Give the order of updates, if it is kept."""
        return self._body.log()


class ServerManager:
    """
    Owns the shard map: cuts the parameters, gives each server node its shard, watches the nodes.

    Args:
        name: of the actor.
        job: the run's job.
        run: its name.
        attempt: its generation.
        servers: handles of the server nodes; the n-th keeps shard n.
        consistency: when they apply gradients.
    """

    def __init__(
        self,
        name: str,
        job: Job,
        run: str,
        attempt: int,
        servers: list[Any],
        consistency: Consistency,
    ) -> None:
        self._name, self._job, self._run, self._attempt = name, job, run, attempt
        self._servers, self._consistency = servers, consistency
        self._joining = threading.Lock()
        self._facts: ModelFacts | None = None
        self._membership: Membership | None = None
        self._lost: DistplatError | None = None
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def poll(self) -> DistplatError | None:
        """Tell the controller which server was lost, if any."""
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
        if facts != self._facts:
            raise ProtocolError(
                f"rank {rank} built another model or data set than the first rank to come: "
                f"{facts} against {self._facts}; model() must not depend on the process"
            )
        return self._membership

    def _assign(self, facts: ModelFacts) -> Membership:
        """Give out the shards; the first server on each node makes the node's segment."""
        cuts = cut_shards(facts.size, len(self._servers))
        everybody = list(range(len(self._servers)))
        nodes = self._ask(everybody, [server.where.remote for server in self._servers])
        first_on = {node: nodes.index(node) for node in nodes}
        plan = ShardPlan(
            self._job,
            self._run,
            self._attempt,
            self._job.scaling.world,
            facts.total_steps,
            len(self._servers),
            self._consistency,
            facts.checkpoint_every,
        )
        made = self._assign_some(plan, cuts, facts, list(first_on.values()), [None] * len(first_on))
        segments = dict(zip(first_on, made, strict=True))
        others = [i for i in range(len(nodes)) if i not in first_on.values()]
        self._assign_some(plan, cuts, facts, others, [segments[nodes[i]] for i in others])
        addresses = [segments[node] for node in nodes]
        return Membership(cuts, self._servers, addresses, self._consistency.private)

    def _assign_some(
        self,
        plan: ShardPlan,
        cuts: ShardMap,
        facts: ModelFacts,
        indices: list[int],
        segments: list[Any],
    ) -> list[Address]:
        calls = [
            partial(
                self._servers[i].assign.remote,
                plan,
                cuts.shards[i],
                facts.size,
                facts.dtype,
                segment,
            )
            for i, segment in zip(indices, segments, strict=True)
        ]
        return self._ask(indices, calls)

    def _ask(self, indices: list[int], calls: Sequence[Call]) -> list[Any]:
        names = [f"server-{index}" for index in indices]
        limit = self._job.failure.start_timeout_s
        return ask("assigning shards", calls, names, limit, "start_timeout_s")

    def logs(self) -> list[NDArray[np.int64]]:
        """Give the shards' orders of updates, where they are kept; none from a lost server."""
        if self._membership is None:
            return []
        everybody = list(range(len(self._servers)))
        logs = self._ask(everybody, [server.log.remote for server in self._servers])
        return [log for log in logs if log is not None]

    def _watch(self) -> None:
        """Note the first server that dies; the controller asks for it by `poll`."""
        heard = dict.fromkeys(range(len(self._servers)), time.monotonic())
        while self._lost is None:
            for index in heard:
                self._lost = self._lost or self._look(index, heard)
            time.sleep(WATCH_S)

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
