"""
Ranks of a `hybrid` grid over several attempts of a run.

Ranks are threads. They keep their strategy object across attempts, and lost ranks get a new one.
Servers are kept, too.
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
    A run of `hybrid` in several attempts.

    Args:
        kind: class of the task.
        options: of `hybrid`; by default two stages and two replicas.
        more: fields of the job.
    """

    def __init__(
        self, task_type: type[Task] = Mlp, *, options: dict[str, Any] | None = None, **more: Any
    ) -> None:
        options = {**EVEN, **(options or {})}
        world = options["pipeline"] * options.get("tensor", 1) * options["data"]
        fields = {"steps": STEPS, "clip_norm": 0.5, "ema": {"decay": 0.8}, **more}
        super().__init__(hybrid_job(options, world, **fields), task_type)
        self.starts: list[int] = []  #: of the last attempt
        self.division = self.roles.division(world)

    def attempt(
        self,
        fabric: Fabric | None = None,
        failing: Set[int] = frozenset(),
        saved: SavedState | None = None,
        base: int = 0,
        wrap_shards: Callable[[int, RemoteShards], Shards] = lambda rank, shards: shards,
    ) -> dict[str, Tensor] | None:
        """
        Run an attempt; return the trained model, or None if a rank was lost.

        Args:
            fabric: connects the ranks.
            deaf: ranks whose barrier of step 3 fails after all ranks have reached it.
            saved: checkpoint from which new ranks start.
            base: steps of the newest checkpoint.
            wrap_shards: wraps a rank's client of the servers.
        """
        attempt = StopOnLostRank(self, fabric, failing, wrap_shards, saved=saved, base=base)
        finished = attempt.make()
        self.starts = attempt.starts
        if not finished:
            return None
        self.close()
        return {k: v for part in self.trained for k, v in part.items()}


class StopOnLostRank(Attempt):
    """
    All ranks stop once a rank is missing.

    Args:
        run: the run.
        fabric: connects the ranks.
        deaf: see `Workers.attempt`.
        wrap_shards: see `Workers.attempt`.
        more: see `Attempt`.
    """

    ends = (Abandoned, ActorLost, CollectiveError, ProtocolError)

    def __init__(
        self,
        run: LocalRun,
        fabric: Fabric | None = None,
        failing: Set[int] = frozenset(),
        wrap_shards: Callable[[int, RemoteShards], Shards] = lambda rank, shards: shards,
        **more: Any,
    ) -> None:
        super().__init__(run, fabric, **more)
        self._deaf, self._wrap_shards = failing, wrap_shards

    def collective(self, rank: int) -> Collective:
        group = super().collective(rank)
        return fail_barrier(group, 3) if rank in self._deaf else group

    def shards(self, rank: int) -> Shards:
        client = super().shards(rank)
        assert isinstance(client, RemoteShards)
        return self._wrap_shards(rank, client)

    def stopped(self, rank: int) -> None:
        self.give_up()


def fail_barrier(group: Any, at: int) -> Collective:
    """Make barrier number `at` fail on this rank after all ranks have reached it."""
    original_barrier, remaining = group.barrier, iter(range(at))

    def barrier() -> None:
        original_barrier()
        if next(remaining, None) is None:
            raise CollectiveError("world", "barrier", 0, (), "this rank was told to give up")

    group.barrier = barrier
    result: Collective = group
    return result


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def samples_per_step(workers: LocalRun, job: Job) -> list[int]:
    """Return the number of samples of each step; later reports replace earlier ones."""
    reports = [report for rank in workers.reports for report in rank]
    counts = {(r.step, r.rank): r.samples for r in reports if isinstance(r, StepReport)}
    ranks = range(job.scaling.world)
    return [sum(counts.get((step, rank), 0) for rank in ranks) for step in range(STEPS)]
