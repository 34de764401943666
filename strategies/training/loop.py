"""
The step loop of one worker, the same under every strategy.

    for each step:   gradients of the rank's part -> exchange -> update
                     `data`, `compute`               `exchange` `update`

What a rank computes is `training/compute.py`'s, or a strategy's own.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import Dataset

from distplat.platform.progress import AnyReport, EvalReport, StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective
from distplat.strategies.sparse.lookups import Lookups
from distplat.strategies.training.compute import Compute, Share, Stopwatch
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.object_collectives import gather_bytes
from distplat.strategies.training.step_exchange import StepExchange, Turn
from distplat.strategies.worker import WorkerStrategy


@dataclass
class Progress:
    """Where a worker is; read by other threads, written by the loop alone."""

    step: int = 0
    """Steps done; the step under way has this number."""
    beats: int = 0
    """Micro-batches and steps done: grows while the worker works, even on no samples."""
    left: bool = False
    """The worker was told to leave before the run's end."""
    begun: bool = False
    """The loop has been entered."""
    evaluating: bool = False
    """The evaluation after `step` is under way, not the next step."""

    @property
    def at(self) -> int | None:
        """The step under way, or the one whose evaluation is, from 1; None: none was begun."""
        if not self.begun:
            return None
        return self.step if self.evaluating else self.step + 1

    def beat(self) -> None:
        """Show that the worker is at work."""
        self.beats += 1


@dataclass
class Loop:
    """
    Trains one worker's model, or its part of one.

    Everything that is reported goes through `report`, which must be quick and may be called from
    this thread only.
    """

    job: Job
    eval_data: Dataset[Any] | None
    flat: FlatModel
    sampler: Sampler
    total_steps: int
    strategy: WorkerStrategy[Any]
    compute: Compute
    rank: int
    report: Callable[[AnyReport], None]
    progress: Progress
    start: int = 0
    """Steps that were made before."""
    checkpoint: Callable[[int], object] = lambda version: None
    """Told after each step how many are done: a checkpoint may be due."""
    lookups: Lookups | None = None
    """The model's embedding tables, if it has some."""
    pause: Callable[[int], object] = lambda step: None
    """Told each step before it is begun; returns when it may be, raises where the attempt ends."""
    evaluated: Callable[[], object] = lambda: None
    """Told after each evaluation: what its forwards wrote is no part of the training."""
    group: Collective | None = None
    """All ranks, over which evaluations are gathered: what every rank has, no rank can take with
    it. None: the ranks have no group."""

    def __post_init__(self) -> None:
        self._exchange = StepExchange(self.job, self.flat, self.strategy, self.lookups)

    def run(self) -> None:
        """Train from the first step that is left to the last, with the evaluations between."""
        self.progress.step, self.progress.begun = self.start, True
        if self.strategy.replayed is not None:
            self._end_step(self.start - 1, self.strategy.replayed, Stopwatch())
        if self.start and self.eval_data is not None and self._evaluates_after(self.start - 1):
            self._evaluate(self.eval_data, self.start)  # it may have been cut off
        steps = range(self.start, self.total_steps)
        self.compute.start(steps)
        for step in steps:
            self.pause(step)
            if self.strategy.skips(step):
                self._skip(step)
            else:
                self._step(step)
            if step + 1 < self.total_steps:
                self.checkpoint(step + 1)
            if self.eval_data is not None and self._evaluates_after(step):
                self.strategy.synchronize()
                self._evaluate(self.eval_data, step + 1)
        self.strategy.synchronize()
        if steps:
            self.checkpoint(self.total_steps)  # now no rank is behind, whatever the strategy

    def _step(self, step: int) -> None:
        self.flat.begin_step()
        clock = Stopwatch()
        share = self.compute.gradients(step, clock)
        self.flat.check_layout(step)
        total = self._exchange.exchange(Turn(step, step), self.rank, share)
        clock.lap("exchange")
        self.strategy.update(step, total)
        clock.lap("update")
        self._end_step(step, share, clock)

    def _end_step(self, step: int, share: Share, clock: Stopwatch) -> None:
        self.flat.version = self.progress.step = step + 1
        self.progress.beats += 1
        epoch = self.sampler.epoch_of(step)
        figures = {**self.strategy.figures(), **self._exchange.figures()}
        seconds, of = clock.seconds, self.total_steps
        mean, samples, weight = share.loss, share.samples, share.weight
        report = StepReport(self.rank, step, epoch, mean, samples, seconds, of, figures, weight)
        self.report(report)

    def _skip(self, step: int) -> None:
        """Leave a step out: the others have made it."""
        clock = Stopwatch()
        self.compute.skip(step)
        clock.lap("data")
        self._end_step(step, Share(), clock)

    def _evaluates_after(self, step: int) -> bool:
        if step + 1 == self.total_steps:
            return True
        every = self.job.evaluation.every_epochs * self.sampler.steps_per_epoch
        return every > 0 and (step + 1) % every == 0

    def _evaluate(self, data: Dataset[Any], step: int) -> None:
        """Run this rank's part of the evaluation data; the controller puts the parts together."""
        self.progress.evaluating = True
        found = self.compute.evaluate(data)
        self.progress.evaluating = False
        self.evaluated()
        mine = EvalReport(self.rank, step, found.samples, found.sums, found.counts)
        if self.group is None:
            self.report(mine)
            return
        text = json.dumps(asdict(mine)).encode()
        for one in gather_bytes(text, self.group, self.flat.params.device):
            self.report(EvalReport(**json.loads(one)))
