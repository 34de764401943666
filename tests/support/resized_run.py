"""
A run in memory whose number of ranks changes: one attempt after the other, on the same servers.

In each attempt but the last rank 0 stops before a given step, and the others wait for it at the
servers with that step's gradient: a step in flight, which the next attempt makes anew.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distplat.platform.errors import Abandoned, FencedError
from distplat.platform.progress import AnyReport, Gathering, Summary
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import Job
from distplat.strategies.base import Strategy
from distplat.strategies.catalog import make_strategy
from distplat.strategies.fakes import InMemoryShards, ServerGroup
from distplat.strategies.task import Task
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.session import Prepared, join, prepare, resize
from distplat.strategies.training.sync_service import SyncService

WAIT_S = 10.0


@dataclass
class Rank:
    """What one worker keeps from attempt to attempt."""

    prepared: Prepared
    strategy: Strategy[Any]
    progress: Progress = field(default_factory=Progress)


@dataclass
class ResizedRun:
    """What came of it."""

    summaries: list[Summary] = field(default_factory=list)
    seen: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """(step, world) -> samples that reported parts of the step are of, in the order of reports."""
    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    """By rank, at the end."""


def train_resized(
    job: Job,
    task: type[Task],
    course: Sequence[tuple[int, int]],
    ids: Callable[[Tensor], list[int]],
) -> ResizedRun:
    """
    Train with several numbers of ranks.

    Args:
        job: names a synchronous strategy with servers.
        task: its class.
        course: ranks, and the step before which they stop; the last number is not looked at.
        ids: reads from a batch's inputs which samples they are.
    """
    run, ranks = ResizedRun(), dict[int, Rank]()
    gathering = Gathering(course[0][0])
    group = _servers(job.with_workers(course[0][0]), task)
    for attempt, (world, stop) in enumerate(course):
        ranks = {
            rank: ranks.get(rank) or _rank(job.with_workers(world), task) for rank in range(world)
        }
        if attempt:
            gathering.resize(world, course[attempt - 1][1])
        following = course[attempt + 1][0] if attempt + 1 < len(course) else None
        attempted = _Attempt(job.with_workers(world), group, ranks, attempt, run, ids)
        for report in attempted.make(stop, following):
            run.summaries += gathering.add(report)
    models = [ranks[rank].prepared.flat.model for rank in range(len(ranks))]
    run.parameters = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    return run


def _rank(job: Job, task: type[Task]) -> Rank:
    strategy = make_strategy(job)
    return Rank(prepare(job, task(), strategy=strategy), strategy)


def _servers(job: Job, task: type[Task]) -> ServerGroup:
    first, roles = _rank(job, task).prepared, make_strategy(job).roles(job)
    world, steps = job.scaling.world, first.total_steps
    plan = ShardPlan(job, "run", 0, world, steps, roles.servers, roles.consistency)
    return ServerGroup(plan, WAIT_S)


class _Attempt:
    """One attempt of all ranks, as threads."""

    def __init__(
        self,
        job: Job,
        group: ServerGroup,
        ranks: dict[int, Rank],
        number: int,
        run: ResizedRun,
        ids: Callable[[Tensor], list[int]],
    ) -> None:
        self._job, self._group, self._ranks, self._number = job, group, ranks, number
        self._run, self._ids = run, ids
        self._reports: list[AnyReport] = []
        self._errors: list[BaseException] = []

    def make(self, before: int, following: int | None) -> list[AnyReport]:
        """
        Go on until rank 0 is before a step; give what ranks reported.

        Args:
            before: the step.
            following: ranks of the next attempt; None: go on to the end.
        """
        stop = None if following is None else before
        threads = [
            threading.Thread(target=self._rank, args=(rank, stop), daemon=True)
            for rank in self._ranks
        ]
        for thread in threads:
            thread.start()
        if stop is not None:
            threads[0].join(WAIT_S)
            self._wait_until_all_others_have_pushed(stop)
            self._group.renew(self._number + 1, following)
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        unexpected = [e for e in self._errors if not isinstance(e, Abandoned | FencedError)]
        assert not unexpected, unexpected
        assert len(self._errors) == (len(threads) if stop is not None else 0)
        return self._reports

    def _wait_until_all_others_have_pushed(self, step: int) -> None:
        until = time.monotonic() + WAIT_S
        for cut in self._group.cuts(self._ranks[0].prepared.flat.size):
            service = self._group.service(cut.index)
            assert isinstance(service, SyncService)
            # Shards are asked one after the other: the second one has not heard of this step.
            while cut.index == 0 and service.shard.ledger.missing() != [0]:
                assert time.monotonic() < until, (step, service.shard.ledger.missing())
                time.sleep(0.005)

    def _rank(self, rank: int, stop: int | None) -> None:
        mine = self._ranks[rank]
        resize(mine.prepared, self._job, mine.strategy)
        samples: list[int] = []

        def note(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                samples.extend(self._ids(inputs[0]))

        def report(part: AnyReport) -> None:
            self._reports.append(part)
            key = part.step, self._job.scaling.world
            self._run.seen[key] = self._run.seen.get(key, []) + samples
            samples.clear()

        def pause() -> None:
            if rank == 0 and mine.progress.step == stop:
                raise Abandoned("told to stop")

        world = self._job.scaling.world
        hook = mine.prepared.flat.model.register_forward_pre_hook(note)
        try:
            join(
                mine.prepared,
                mine.strategy,
                rank,
                collective=None,
                shards=InMemoryShards(self._group, rank, self._number, world),
                report=report,
                progress=mine.progress,
                pause=pause,
            ).run()
        except BaseException as error:
            self._errors.append(error)
        finally:
            hook.remove()
