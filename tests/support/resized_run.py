"""
A run in memory whose number of ranks changes: one attempt after the other, on the same servers.

In each attempt but the last all are told to rest while rank 0 is behind: the others have pushed the
gradient of the step before the one at which all are to stop, and wait for rank 0's at the servers.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from in_memory_run import impatient
from torch import Tensor

from distplat.actors.local_actors import Servers
from distplat.actors.servers.shards import RemoteShards
from distplat.platform.calling_off import Agreement
from distplat.platform.errors import Abandoned
from distplat.platform.progress import AnyReport, Gathering, Summary
from distplat.platform.spec import Job
from distplat.strategies.base import Pushed, Strategy
from distplat.strategies.catalog import make_strategy
from distplat.strategies.task import Task
from distplat.strategies.training.control import StepControl
from distplat.strategies.training.gate import Gate
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.session import Ports, Prepared, join, prepare, resize
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
    pushed: list[tuple[int, int]] = field(default_factory=list)
    """(step, rank) of each gradient on its way to the servers, in any order."""
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
    first = job.with_workers(course[0][0])
    servers = Servers(impatient(first, WAIT_S), make_strategy(first).roles(first))
    for attempt, (world, stop) in enumerate(course):
        ranks = {
            rank: ranks.get(rank) or _rank(job.with_workers(world), task) for rank in range(world)
        }
        if attempt:
            gathering.resize(world, course[attempt - 1][1])
        following = course[attempt + 1][0] if attempt + 1 < len(course) else None
        attempted = _Attempt(job.with_workers(world), servers, ranks, attempt, run, ids)
        start = course[attempt - 1][1] if attempt else 0
        for report in attempted.make(start, None if following is None else stop):
            run.summaries += gathering.add(report)
    servers.close()
    models = [ranks[rank].prepared.flat.model for rank in range(len(ranks))]
    run.parameters = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    return run


def _rank(job: Job, task: type[Task]) -> Rank:
    strategy = make_strategy(job)
    return Rank(prepare(job, task(), strategy=strategy), strategy)


class _Attempt:
    """One attempt of all ranks, as threads."""

    def __init__(
        self,
        job: Job,
        servers: Servers,
        ranks: dict[int, Rank],
        number: int,
        run: ResizedRun,
        ids: Callable[[Tensor], list[int]],
    ) -> None:
        self._job, self._servers, self._ranks, self._number = job, servers, ranks, number
        self._run, self._ids = run, ids
        self._reports: list[AnyReport] = []
        self._errors: list[BaseException] = []
        self._gates = {rank: Gate(WAIT_S) for rank in ranks}
        self._behind = -1  #: step before which rank 0 has all told to rest

    def make(self, start: int, stop: int | None) -> list[AnyReport]:
        """
        Go on until all are before a step; give what ranks reported.

        Args:
            start: the attempt's first step.
            stop: the step; None: go on to the end.
        """
        if stop == start:
            self._rest()  # they hear it before they have begun
        elif stop is not None:
            self._behind = stop - 1 if len(self._ranks) > 1 else stop
        threads = [
            threading.Thread(target=self._rank, args=(rank,), daemon=True) for rank in self._ranks
        ]
        for thread in threads:
            thread.start()
        if stop is not None:
            self._rest_at(stop)
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        unexpected = [e for e in self._errors if not isinstance(e, Abandoned)]
        assert not unexpected, unexpected
        assert len(self._errors) == (len(threads) if stop is not None else 0)
        return self._reports

    def _rest(self) -> None:
        for gate in self._gates.values():
            gate.rest()

    def _rest_at(self, stop: int) -> None:
        """Ask who rests where, as the controller does, and tell all."""
        agreement, until = Agreement(), time.monotonic() + WAIT_S
        while (agreed := agreement.step(self._ranks)) is None:
            assert time.monotonic() < until, agreement.missing(self._ranks)
            for rank, gate in self._gates.items():
                agreement.answered(rank, gate.answer)
            time.sleep(0.005)
        assert agreed == stop
        for gate in self._gates.values():
            gate.rest_at(agreed)

    def _before(self, rank: int, step: int) -> None:
        if (rank, step) == (0, self._behind):
            self._wait_until_all_others_have_pushed(step)
            self._rest()
        self._gates[rank].before(step)

    def _wait_until_all_others_have_pushed(self, step: int) -> None:
        until = time.monotonic() + WAIT_S
        service = self._servers.service(0)  # the second one has not heard of this step
        assert isinstance(service, SyncService)
        others = len(self._ranks) > 1
        while others and service.shard.ledger.missing() != [0]:
            assert time.monotonic() < until, (step, service.shard.ledger.missing())
            time.sleep(0.005)

    def _rank(self, rank: int) -> None:
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

        hook = mine.prepared.flat.model.register_forward_pre_hook(note)
        try:
            join(
                mine.prepared,
                mine.strategy,
                rank,
                Ports(shards=self._shards(rank)),
                report=report,
                progress=mine.progress,
                pause=partial(self._before, rank),
            ).run()
        except BaseException as error:
            self._errors.append(error)
        finally:
            hook.remove()

    def _shards(self, rank: int) -> RemoteShards:
        """Give the way to the servers; it notes what is pushed."""
        steps, number = self._ranks[rank].prepared.total_steps, self._number
        shards = self._servers.shards(rank, steps, attempt=number, job=self._job)
        push = shards.push

        def noted(step: int, control: StepControl, task: int | None = None) -> Pushed:
            self._run.pushed.append((step, rank))
            return push(step, control, task)

        shards.push = noted  # type: ignore[method-assign]
        return shards
