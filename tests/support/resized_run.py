"""
A run in memory whose number of ranks changes: one attempt after the other, on the same servers.

In each attempt but the last all are told to rest while rank 0 is behind: the others have pushed the
gradient of the step before the one at which all are to stop, and wait for rank 0's at the servers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from local_run import Attempt, LocalRun
from torch import Tensor

from distplat.actors.servers.shards import RemoteShards
from distplat.platform.errors import Abandoned
from distplat.platform.progress import AnyReport, ReportAggregator, Summary
from distplat.platform.quiesce import Agreement
from distplat.platform.spec import Job
from distplat.strategies.loop.control import StepControl
from distplat.strategies.loop.pause import PauseGate
from distplat.strategies.ports import Pushed, Shards
from distplat.strategies.server.server import ShardServer
from distplat.strategies.task import Task

WAIT_S = 10.0


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
    found, gathering = ResizedRun(), ReportAggregator(course[0][0])
    run = LocalRun(job.with_workers(course[0][0]), task)
    for number, (world, stop) in enumerate(course):
        if number:
            run.resize(world)
            gathering.resize(world, course[number - 1][1])
        start, last = (course[number - 1][1] if number else 0), number == len(course) - 1
        attempt = _UntilARest(run, start, None if last else stop, found, ids)
        attempt.make()
        assert len(attempt.errors) == (0 if last else world)
        for report in attempt.reports:
            found.summaries += gathering.add(report)
    run.close()
    found.parameters = [run.parameters(rank) for rank in range(len(run.ranks))]
    return found


class _UntilARest(Attempt):
    """
    All ranks are told to rest before a step.

    Args:
        run: the run.
        start: the attempt's first step.
        stop: the step; None: go on to the end.
        found: notes what is seen.
        ids: see `train_resized`.
    """

    ends = (Abandoned,)

    def __init__(
        self,
        run: LocalRun,
        start: int,
        stop: int | None,
        found: ResizedRun,
        ids: Callable[[Tensor], list[int]],
    ) -> None:
        super().__init__(run)
        self._stop, self._found, self._ids = stop, found, ids
        self.reports: list[AnyReport] = []
        self._samples: list[list[int]] = [[] for _ in range(self.world)]
        self._gates = [PauseGate(WAIT_S) for _ in range(self.world)]
        self._behind = -1  #: step before which rank 0 has all told to rest
        if stop == start:
            self._rest()  # they hear it before they have begun
        elif stop is not None:
            self._behind = stop - 1 if self.world > 1 else stop

    def _rest(self) -> None:
        for gate in self._gates:
            gate.rest()

    def meanwhile(self) -> None:
        """Ask who rests where, as the controller does, and tell all."""
        if self._stop is None:
            return
        agreement, until, ranks = Agreement(), time.monotonic() + WAIT_S, range(self.world)
        while (agreed := agreement.step(ranks)) is None:
            assert time.monotonic() < until, agreement.missing(ranks)
            for rank, gate in enumerate(self._gates):
                agreement.answered(rank, gate.answer)
            time.sleep(0.005)
        assert agreed == self._stop
        for gate in self._gates:
            gate.rest_at(agreed)

    def before(self, rank: int, step: int) -> bool:
        if (rank, step) == (0, self._behind):
            self._wait_until_all_others_have_pushed(step)
            self._rest()
        return self._gates[rank].before(step)

    def _wait_until_all_others_have_pushed(self, step: int) -> None:
        until = time.monotonic() + WAIT_S
        service = self.run.servers.shard_server(0)  # the second one has not heard of this step
        assert isinstance(service, ShardServer)
        while self.world > 1 and service.store.ledger.missing() != [0]:
            assert time.monotonic() < until, (step, service.store.ledger.missing())
            time.sleep(0.005)

    def make(self) -> bool:
        """Train, and note which samples each rank's model sees."""
        models = [rank.prepared.flat.model for rank in self.run.ranks]
        notes = [partial(self._note, samples) for samples in self._samples]
        hooks = [m.register_forward_pre_hook(n) for m, n in zip(models, notes, strict=True)]
        try:
            return super().make()
        finally:
            for hook in hooks:
                hook.remove()

    def _note(
        self, samples: list[int], module: torch.nn.Module, inputs: tuple[Tensor, ...]
    ) -> None:
        if module.training:
            samples.extend(self._ids(inputs[0]))

    def report(self, rank: int, report: AnyReport) -> None:
        self.reports.append(report)
        key = report.step, self.world
        self._found.seen[key] = self._found.seen.get(key, []) + self._samples[rank]
        self._samples[rank].clear()

    def shards(self, rank: int) -> Shards:
        """Give the way to the servers; it notes what is pushed."""
        shards = super().shards(rank)
        assert isinstance(shards, RemoteShards)
        push = shards.push

        def noted(step: int, control: StepControl, task: int | None = None) -> Pushed:
            self._found.pushed.append((step, rank))
            return push(step, control, task)

        shards.push = noted  # type: ignore[method-assign]
        return shards
