"""
The loop of a worker that leases its tasks: it asks for work, does it, says that it is done.

    ask ─▶ tasks 12..16, or a part of an evaluation, or "nothing more"
             for each task:   gradient of that part of that step -> exchange -> update -> done
                                              rows of tables, if there are some ─┘

A task is reported as what it is, part p of step s, whoever made it: so a step's report is complete
when all its parts are, and metrics do not depend on who was fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distplat.platform.progress import AnyReport, EvalReport, StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.platform.task_scheduler import TaskPlan, Work
from distplat.strategies.ports import Leases
from distplat.strategies.training.compute import Stopwatch
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.prepared import Prepared
from distplat.strategies.training.step_exchange import StepExchange, Turn
from distplat.strategies.training.task_compute import TaskModel
from distplat.strategies.worker import WorkerStrategy


def course_of(job: Job, sampler: Sampler, steps: int, first: int, evaluates: bool) -> TaskPlan:
    """
    Say what there is to do in a run.

    Args:
        job: the run.
        sampler: the order of its data; its world is the number of parts of a step.
        steps: of the run.
        first: steps that were made before.
        evaluates: whether there is evaluation data.
    """
    every = job.evaluation.every_epochs * sampler.steps_per_epoch
    times = {*(range(every, steps, every) if every else ()), steps} if evaluates else set()
    # One that falls on the first step may have been cut off.
    due = tuple(sorted(time for time in times if time >= max(1, first)))
    return TaskPlan(steps, sampler.world, first, due)


@dataclass
class LeasedLoop:
    """Trains one worker's model on what it is given; see `Loop` for the fields."""

    prepared: Prepared
    strategy: WorkerStrategy[Any]
    rank: int
    report: Callable[[AnyReport], None]
    progress: Progress
    leases: Leases
    compute: TaskModel
    start: int = 0
    checkpoint: Callable[[int], object] = lambda version: None

    def __post_init__(self) -> None:
        self.flat, self.sampler = self.prepared.flat, self.prepared.sampler
        self.total_steps, self.eval_data = self.prepared.total_steps, self.prepared.eval_data
        given = self.prepared.job, self.flat, self.strategy, self.prepared.lookups
        self._exchange = StepExchange(*given)
        self._made = 0  #: tasks, in this attempt: the number of the next push

    def run(self) -> None:
        """Work until there is nothing more to do."""
        try:
            self._work()
        finally:
            self.compute.close()

    def _work(self) -> None:
        self.progress.step = self._offered = self.start
        self.progress.begun = True
        self._final, self._idle_s = False, 0.0
        while not (work := self._next()).over:
            self._make_final(work)
            for version, part in work.evaluations:
                self._evaluate(version, part)
            self.compute.read(work.tasks)
            for task in work.tasks:
                self._make(task)
            self._offer_checkpoints(work.reach)
        self._make_final(work)
        self.progress.left = not work.trained

    def _next(self) -> Work:
        began = time.perf_counter()
        work = self.leases.next(self.progress.beat)
        self._idle_s += time.perf_counter() - began
        return work

    def _make(self, task: int) -> None:
        self.flat.begin_step()
        clock = Stopwatch()
        share = self.compute.gradients(task, clock)
        step, part = divmod(task, self.sampler.world)
        self.flat.check_layout(step)
        total = self._exchange.exchange(Turn(step, self._made, task), self.rank, share)
        self._made += 1
        clock.lap("exchange")
        self.strategy.update(task, total)
        clock.lap("update")
        self.leases.finish((task,))
        self.progress.step = max(self.progress.step, step + 1)
        self.flat.version = self.progress.step
        self.progress.beat()
        epoch = self.sampler.epoch_of(step)
        figures = {**self.strategy.figures(), "lease_s": self._idle_s}
        figures |= self._exchange.figures()
        self._idle_s = 0.0
        seconds, of, mean, weight = clock.seconds, self.total_steps, share.loss, share.weight
        samples = share.samples
        self.report(StepReport(part, step, epoch, mean, samples, seconds, of, figures, weight))

    def _make_final(self, work: Work) -> None:
        """Take the final parameters, once every task is done."""
        if not work.trained or self._final:
            return
        self._final = True
        self.strategy.synchronize()
        self.progress.step = self.flat.version = self.total_steps
        if self.rank == 0 and self.start < self.total_steps:
            self._offer_checkpoints(self.total_steps - 1)
            self.checkpoint(self.total_steps)

    def _evaluate(self, version: int, part: int) -> None:
        assert self.eval_data is not None, "evaluations are asked for only where there is data"
        if not self._final:
            self.strategy.synchronize()
        self.progress.evaluating = True
        found = self.compute.evaluate_part(self.eval_data, part)
        self.progress.evaluating = False
        if self.prepared.state is not None:
            self.prepared.state.discard()
        sums = found.samples, found.sums, found.counts
        self.report(EvalReport(part, version, *sums))
        self.leases.finish((), ((version, part),))
        self.progress.beat()

    def _offer_checkpoints(self, reach: int) -> None:
        """Rank 0 asks for the copies early: shards have the newest ones only."""
        if self.rank == 0:
            for version in range(self._offered + 1, min(reach, self.total_steps - 1) + 1):
                self.checkpoint(version)
                self._offered = version
