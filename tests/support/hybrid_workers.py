"""
Ranks of a grid that live through several attempts of a run.

They are threads, which come back with the strategy object that they had; a lost one comes with a
new one. Servers, where the job has some, live through all attempts.
"""

from collections.abc import Callable, Set
from typing import Any

import torch
from hybrid_models import Mlp, hybrid_job
from local_run import Attempt, LocalRun
from torch import Tensor

from distplat.actors.servers.shards import RemoteShards
from distplat.platform.errors import Abandoned, ActorLost, CollectiveError, ProtocolError
from distplat.platform.progress import StepReport
from distplat.platform.spec import Job
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.collective import Collective
from distplat.strategies.fakes import Fabric
from distplat.strategies.ports import Shards
from distplat.strategies.task import Task

STEPS = 6
WORLD = 4
EVEN = {"pipeline": 2, "data": 2, "cut": "even", "micro_batches": 2}


class Workers(LocalRun):
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
        world = options["pipeline"] * options.get("tensor", 1) * options["data"]
        fields = {"steps": STEPS, "clip_norm": 0.5, "ema": {"decay": 0.8}, **more}
        super().__init__(hybrid_job(options, world, **fields), kind)
        self.starts: list[int] = []  #: of the last attempt
        self.division = self.roles.division(world)

    def attempt(
        self,
        fabric: Fabric | None = None,
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
        attempt = UntilOneIsLost(self, fabric, deaf, around, saved=saved, base=base)
        finished = attempt.make()
        self.starts = attempt.starts
        if not finished:
            return None
        self.close()
        return {k: v for part in self.trained for k, v in part.items()}


class UntilOneIsLost(Attempt):
    """
    All ranks stop once one does not come.

    Args:
        run: the run.
        fabric: connects the ranks.
        deaf: see `Workers.attempt`.
        around: see there.
        more: see `Attempt`.
    """

    ends = (Abandoned, ActorLost, CollectiveError, ProtocolError)

    def __init__(
        self,
        run: LocalRun,
        fabric: Fabric | None = None,
        deaf: Set[int] = frozenset(),
        around: Callable[[int, RemoteShards], Shards] = lambda rank, shards: shards,
        **more: Any,
    ) -> None:
        super().__init__(run, fabric, **more)
        self._deaf, self._around = deaf, around

    def collective(self, rank: int) -> Collective:
        group = super().collective(rank)
        return torn(group, 3) if rank in self._deaf else group

    def shards(self, rank: int) -> Shards:
        way = super().shards(rank)
        assert isinstance(way, RemoteShards)
        return self._around(rank, way)

    def stopped(self, rank: int) -> None:
        self.give_up()


def torn(group: Any, at: int) -> Collective:
    """The agreement `at` is reached, but this rank does not hear of it: it was told to stop."""
    meet, left = group.barrier, iter(range(at))

    def barrier() -> None:
        meet()
        if next(left, None) is None:
            raise CollectiveError("world", "barrier", 0, (), "this rank was told to give up")

    group.barrier = barrier
    found: Collective = group
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def samples(workers: LocalRun, job: Job) -> list[int]:
    """Count the samples of each step; what a rank reports again replaces what it reported."""
    reports = [report for rank in workers.reports for report in rank]
    found = {(r.step, r.rank): r.samples for r in reports if isinstance(r, StepReport)}
    ranks = range(job.scaling.world)
    return [sum(found.get((step, rank), 0) for rank in ranks) for step in range(STEPS)]
