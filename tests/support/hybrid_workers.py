"""
Ranks of a grid that live through several attempts of a run.

They are threads, which come back with the strategy object that they had; a lost one comes with a
new one. Servers, where the job has some, live through all attempts.
"""

from collections.abc import Callable, Set
from functools import partial
from typing import Any

import torch
from hybrid_models import Mlp, job_of
from in_memory_run import Keeper, impatient, take
from rank_threads import on_ranks
from torch import Tensor

from distplat.actors.local_actors import Servers
from distplat.actors.servers.shards import RemoteShards
from distplat.platform.errors import ActorLost, CollectiveError, ProtocolError
from distplat.platform.progress import AnyReport, StepReport
from distplat.platform.spec import Job
from distplat.strategies.base import Collective, Shards, Strategy
from distplat.strategies.catalog import make_strategy
from distplat.strategies.fakes import Fabric
from distplat.strategies.pipeline.rebound import Rebound
from distplat.strategies.task import Task
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.restoring import SavedState
from distplat.strategies.training.session import Around, Ports, Prepared, join, prepare

STEPS = 6
WORLD = 4
EVEN = {"pipeline": 2, "data": 2, "cut": "even", "micro_batches": 2}


class Workers:
    """
    See the top of the file.

    Args:
        kind: the task's.
        options: of `hybrid`; by default two stages and two replicas.
        more: fields of the job.
    """

    def __init__(
        self, kind: type[Task] = Mlp, *, options: dict[str, Any] | None = None, **more: Any
    ) -> None:
        options = {**EVEN, **(options or {})}
        self.world = options["pipeline"] * options.get("tensor", 1) * options["data"]
        fields = {"steps": STEPS, "clip_norm": 0.5, **more}
        self.kind, self.job = kind, job_of(options, self.world, **fields)
        self.strategies: dict[int, Strategy[Any]] = {}
        self.prepared: dict[int, Prepared] = {}
        self.reports: list[AnyReport] = []
        self.starts: list[int] = []
        self.checkpoints: dict[int, SavedState] = {}
        self.number = -1  #: of the last attempt
        for rank in range(self.world):
            self.renew(rank)
        self.servers: Servers | None = None
        self.begin_servers()

    def renew(self, rank: int) -> None:
        """Put a new process in the place of one that was lost."""
        self.strategies[rank] = make_strategy(self.job)
        self.prepared[rank] = prepare(self.job, self.kind(), strategy=self.strategies[rank])

    def begin_servers(self) -> None:
        """Have servers, if the job wants some, that know nothing yet."""
        roles = self.strategies[0].roles(self.job)
        self.division = roles.division(self.world)
        self.close()
        if roles.servers:
            self.servers = Servers(impatient(self.job, 10.0), roles)

    def close(self) -> None:
        """End the servers."""
        if self.servers is not None:
            self.servers.close()

    def begin_anew(self) -> None:
        """Put new processes in the place of all."""
        for rank in range(self.world):
            self.renew(rank)
        self.begin_servers()

    def attempt(
        self,
        fabric: Fabric,
        deaf: Set[int] = frozenset(),
        saved: SavedState | None = None,
        base: int = 0,
        around: Callable[[int, RemoteShards], Shards] = lambda rank, shards: shards,
    ) -> dict[str, Tensor] | None:
        """
        Give the trained model, or None where ranks stopped because one was missing.

        Args:
            fabric: connects the ranks.
            deaf: ranks that do not hear of the agreement on step 3.
            saved: what new ranks begin from.
            base: steps of the newest checkpoint.
            around: puts something around a rank's way to the servers.
        """
        self.number += 1
        stopped: list[Exception] = []
        keeper = Keeper(self.job, self.checkpoints)

        def shards(rank: int) -> Shards | None:
            if self.servers is None:
                return None
            every = self.job.checkpoint.period(self.prepared[rank].sampler.steps_per_epoch)
            way = self.servers.shards(rank, STEPS, attempt=self.number, every=every)
            return around(rank, way)

        def collective(rank: int) -> Collective:
            group = fabric.collective(rank)
            return Torn(group, 3) if rank in deaf else group

        def body(rank: int) -> dict[str, Tensor]:
            courier = keeper.courier(rank)
            try:
                loop = join(
                    self.prepared[rank],
                    self.strategies[rank],
                    rank,
                    Ports(
                        collective=collective(rank),
                        shards=shards(rank),
                    ),
                    report=self.reports.append,
                    progress=Progress(),
                    around=Around(saved, base, partial(take, courier)),
                )
                self.starts.append(loop.start)
                loop.run()
                state = self.strategies[rank].trained(self.prepared[rank].flat)
            except (ActorLost, CollectiveError, ProtocolError) as error:
                stopped.append(error)
                fabric.give_up()  # as the controller has all stop
                if self.servers is not None:
                    self.servers.renew(self.number + 1)
                return {}
            courier.flush()
            return {name: tensor.clone() for name, tensor in state.items()}

        try:
            parts = on_ranks(self.world, body)
        except BaseException:
            self.close()
            raise
        if stopped:
            if self.servers is not None:
                self.servers.end_attempt()
            return None
        self.close()
        return {k: v for part in parts for k, v in part.items()}


class Torn(Rebound):
    """The agreement `at` is reached, but this rank does not hear of it: it was told to stop."""

    def __init__(self, group: Collective, at: int) -> None:
        super().__init__(group)
        self._left = at

    def barrier(self) -> None:
        super().barrier()
        self._left -= 1
        if self._left < 0:
            raise CollectiveError("world", "barrier", 0, (), "this rank was told to give up")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def samples(reports: list[AnyReport], job: Job) -> list[int]:
    """Count the samples of each step; what a rank reports again replaces what it reported."""
    found = {(r.step, r.rank): r.samples for r in reports if isinstance(r, StepReport)}
    ranks = range(job.scaling.world)
    return [sum(found.get((step, rank), 0) for rank in ranks) for step in range(STEPS)]
