"""
A run in memory whose number of ranks changes from attempt to attempt, on the same servers.

In each attempt but the last, one rank receives the stop order, a step before all ranks stop. The
attempts give the order to different ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from local_run import Attempt, LocalRun
from torch import Tensor

from distplat.actors.servers.shards import RemoteShards
from distplat.platform.errors import Abandoned
from distplat.platform.progress import AnyReport, ReportAggregator, Summary
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.control import StepControl
from distplat.strategies.ports import Pushed, Shards
from distplat.strategies.task import Task


@dataclass
class ResizedRun:
    """Results of a run."""

    summaries: list[Summary] = field(default_factory=list)
    seen: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Samples of the reported parts by (step, world), in the order of the reports."""
    pushed: list[tuple[int, int]] = field(default_factory=list)
    """(step, rank) of each push, in any order."""
    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    """Final parameters by rank."""


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
        task: class of the task.
        course: (number of ranks, step before which they stop); the last step is ignored.
        ids: returns the sample ids of a batch's inputs.
    """
    resized, aggregator = ResizedRun(), ReportAggregator(course[0][0])
    run = LocalRun(job.with_workers(course[0][0]), task)
    for number, (world, stop) in enumerate(course):
        if number:
            run.resize(world)
            aggregator.resize(world, course[number - 1][1])
        last = number == len(course) - 1
        attempt = _AttemptUntilStep(run, None if last else stop, resized, ids)
        attempt.make()
        assert len(attempt.errors) == (0 if last else world)
        for report in attempt.reports:
            resized.summaries += aggregator.add(report)
    run.close()
    resized.parameters = [run.parameters(rank) for rank in range(len(run.ranks))]
    return resized


class _AttemptUntilStep(Attempt):
    """
    All ranks stop before a step, after one rank's stop order.

    Args:
        run: the run.
        stop: the step; None: train to the end.
        found: records samples and pushes.
        ids: see `train_resized`.
    """

    ends = (Abandoned,)

    def __init__(
        self,
        run: LocalRun,
        stop: int | None,
        resized: ResizedRun,
        ids: Callable[[Tensor], list[int]],
    ) -> None:
        super().__init__(run)
        self._stop, self._resized, self._ids = stop, resized, ids
        self.reports: list[AnyReport] = []
        self._samples: list[list[int]] = [[] for _ in range(self.world)]

    def before(self, rank: int, step: int) -> StopOrder:
        if self._stop is None or rank != self.number % self.world:
            return StopOrder.NONE
        order_step = self._stop if self.world == 1 else self._stop - 1
        return StopOrder.RESIZE if step >= order_step else StopOrder.NONE

    def make(self) -> bool:
        """Train, and record the samples of each rank's model."""
        models = [rank.prepared.flat.model for rank in self.run.ranks]
        recorders = [partial(self._record_samples, samples) for samples in self._samples]
        hooks = [m.register_forward_pre_hook(n) for m, n in zip(models, recorders, strict=True)]
        try:
            return super().make()
        finally:
            for hook in hooks:
                hook.remove()

    def _record_samples(
        self, samples: list[int], module: torch.nn.Module, inputs: tuple[Tensor, ...]
    ) -> None:
        if module.training:
            samples.extend(self._ids(inputs[0]))

    def report(self, rank: int, report: AnyReport) -> None:
        self.reports.append(report)
        key = report.step, self.world
        self._resized.seen[key] = self._resized.seen.get(key, []) + self._samples[rank]
        self._samples[rank].clear()

    def shards(self, rank: int) -> Shards:
        """Return a rank's client of the servers, which records pushes."""
        shards = super().shards(rank)
        assert isinstance(shards, RemoteShards)
        push = shards.push

        def record_push(step: int, control: StepControl, task: int | None = None) -> Pushed:
            self._resized.pushed.append((step, rank))
            return push(step, control, task)

        shards.push = record_push  # type: ignore[method-assign]
        return shards
