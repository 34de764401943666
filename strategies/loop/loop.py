"""The training loops of a worker: `Loop` over steps, `LeasedLoop` over leased tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override

from distplat.platform.errors import Abandoned
from distplat.platform.progress import UNBOUNDED, AnyReport, EvalReport, StepReport, join_evals
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.platform.task_scheduler import Lease, TaskPlan
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.loop.batches import collate_of
from distplat.strategies.loop.compute import Compute, Share, Stopwatch, Sums, TaskModel
from distplat.strategies.loop.control import NonFiniteSteps, StepControl
from distplat.strategies.loop.gathering import Gathering
from distplat.strategies.loop.metric_states import TaskMetrics
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.model.optim import rate_figures
from distplat.strategies.ports import Leases
from distplat.strategies.sparse.lookups import RowPush
from distplat.strategies.strategy_spec import rows_before_gradients
from distplat.strategies.worker_strategy import WorkerStrategy


class StepExchange:
    """
    Exchanges gradients and embedding rows, and decides whether the step is applied.

    Args:
        prepared: model, embedding tables and loss scale of this rank.
        strategy: the job's strategy.
        rank: this rank.
    """

    def __init__(self, prepared: Prepared, strategy: WorkerStrategy[Any], rank: int) -> None:
        self._job, self._flat, self._lookups = prepared.job, prepared.flat, prepared.lookups
        self._strategy, self._rank = strategy, rank
        self._may_drop = collate_of(prepared.task) is not None
        self._steps, self._scale = NonFiniteSteps.of(prepared.job), prepared.loss_scale

    def begin(self) -> None:
        """Start a step: discard all gradients, also those of a backward in an evaluation."""
        self._flat.begin_step()
        if self._lookups is not None:
            self._lookups.clear()

    def exchange(
        self,
        step: int,
        share: Share,
        *,
        number: int,
        task: int | None = None,
        stop: StopOrder = StopOrder.NONE,
    ) -> StepControl:
        """
        Exchange the gradients of a step.

        Args:
            step: step, from 0.
            share: this rank's loss, samples and weight of the step.
            number: number of the push to embedding tables.
            task: number of the leased task; None: tasks are not leased.
            stop: this rank's stop order.

        Returns:
            Sum of all ranks' control records, which says whether the step is skipped.

        Raises:
            NonFiniteError: the job ends at a step that is not finite.
            ValueError: ranks have read different batches of a stream.
        """
        local = replace(share.record(self._rank, self._flat), stop=stop)
        index = step if task is None else task
        if self._lookups is None:
            total = self._exchange_scaled(index, step, local)
        else:
            flat, slots = self._flat, len(self._flat.slots)
            rescales = share.weighted or self._may_drop
            rows = RowPush(self._lookups, self._steps, local, number, task, rescales, slots)
            rows.before(waits=task is None and rows_before_gradients(self._job))
            total = self._strategy.exchange(index, rows.local)
            name = lambda slot: flat.name(slot) if slot < slots else rows.name(slot)  # noqa: E731
            total = self._steps.decide(total, step, name)
            # Rows go before the update and the end of the task, so that none is lost.
            rows.after(total)
        total.check_batch(local, step)
        return total

    def _exchange_scaled(self, index: int, step: int, local: StepControl) -> StepControl:
        """Exchange gradients; a step whose loss scale was too large is skipped."""
        scale = self._scale
        if scale is not None:
            local = replace(local, weight=local.weight * scale.value)  # scaled like the gradients
        total = self._strategy.exchange(index, local)
        if scale is not None and scale.update(step, total):
            return replace(total, skip=True)
        return self._steps.decide(total, step, self._flat.name)

    def figures(self) -> dict[str, float]:
        """Return metrics of tables and skipped steps, and the loss scale of the next step."""
        figures = self._steps.figures()
        if self._scale is not None:
            figures["loss_scale"] = self._scale.value
        return figures if self._lookups is None else {**figures, **self._lookups.figures()}


@dataclass
class Progress:
    """Position of a worker in the run; written by the loop, read by other threads."""

    step: int = 0
    """Number of finished steps, and index of the current step."""
    beats: int = 0
    """Number of finished micro-batches and steps; grows as long as the worker makes progress."""
    left: bool = False
    """Whether the worker was dismissed before the end of the run."""
    begun: bool = False
    """Whether the loop has started."""
    evaluating: bool = False
    """Whether the evaluation after `step` is running."""
    returned: str = ""
    """Description of where a train function returned; empty: it has not returned."""

    @property
    def at(self) -> int | None:
        """Current step, or the step that is evaluated, from 1; None: the loop has not started."""
        if not self.begun:
            return None
        return self.step if self.evaluating else self.step + 1

    def beat(self) -> None:
        """Count progress, so that the worker does not count as stalled."""
        self.beats += 1


@dataclass
class _LoopBase:
    """
    Base class of `Loop` and `LeasedLoop`.

    All reports go through `report`, which must not block, and is called in this thread only.
    """

    prepared: Prepared
    strategy: WorkerStrategy[Any]
    rank: int
    report: Callable[[AnyReport], None]
    progress: Progress
    start: int
    """Number of steps that were finished before this attempt."""
    checkpoint: Callable[[int, bool], object]
    """Called with the number of finished steps and whether the run stops there; takes a checkpoint
    if the run stops or a checkpoint is due."""
    gathering: Gathering
    """This rank's state of `distplat.all_gather`."""
    checkpoint_step: int
    """Step of the newest checkpoint at the start of the attempt."""

    def __post_init__(self) -> None:
        p = self.prepared
        assert p.state is not None, "join() makes it"
        self.flat, self.sampler, self.state = p.flat, p.sampler, p.state
        self.total_steps, self.eval_data = p.total_steps, p.eval_data
        self._exchange = StepExchange(p, self.strategy, self.rank)

    def _report_step(
        self, part: int, step: int, share: Share, clock: Stopwatch, more: Mapping[str, float]
    ) -> None:
        """Report one rank's or task's part of a step."""
        epoch, total = self.sampler.epoch_of(step), self.total_steps
        known_total = 0 if total == UNBOUNDED else total
        figures = {**self.strategy.figures(), **more, **self._exchange.figures()}
        figures |= rate_figures(self.prepared.job, step, total)
        mean, samples, weight = share.loss, share.samples, share.weight
        seconds = clock.seconds
        counts = samples, seconds, known_total
        self.report(StepReport(part, step, epoch, mean, *counts, figures, weight))

    def _run_evaluation(self, evaluate: Callable[[], Sums]) -> Sums:
        """Evaluate with the weights, and with their average under EMA; restore the model state."""
        with self.flat.process:
            sums = evaluate()
        self.state.discard()
        if self.prepared.job.ema is not None:
            with self.flat.with_params(self.strategy.average()):
                with self.flat.process:
                    sums.merge(evaluate(), "ema_")
            self.state.discard()
        return sums


@dataclass
class Loop(_LoopBase):
    """Trains one worker's model, or its shard of the model, step by step."""

    compute: Compute
    stop: Callable[[int], StopOrder]
    """Returns this rank's stop order before a step; all ranks stop after the same step."""
    group: Collective | None
    """Group of all ranks, which gathers evaluation results, so that a lost rank loses none; None:
    the ranks have no group."""
    metrics: TaskMetrics
    """The task's metrics with state."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.job = self.prepared.job
        self._agreed = StopOrder.NONE  #: stop order that all ranks obey before the next step

    def run(self) -> StopOrder:
        """
        Train the remaining steps, with evaluations and checkpoints.

        Returns:
            Stop order that all ranks obeyed; NONE: the last step is done.

        Raises:
            Abandoned: the attempt was cancelled.
        """
        self.progress.step, self.progress.begun = self.start, True
        share = self._unreported_share()
        if share is not None:
            self._end_step(self.start - 1, share, Stopwatch())
        if self.eval_data is not None and self._evaluates_at_start():
            self._evaluate(self.eval_data, self.start)
        steps = range(self.start, self.total_steps)
        self.compute.start(steps)
        for step in steps:
            stop_order = self._stop_order(step)
            if self.strategy.skips(step):
                self._skip(step)
            elif self._agreed:
                return self._stop(step)
            else:
                self._step(step, stop_order)
            saves = self._agreed is StopOrder.SAVE
            if step + 1 < self.total_steps:
                self._take_checkpoint(step + 1, saves)
            # A stopping run has little time: the resumed run makes the evaluation that is due.
            if self.eval_data is not None and self._evaluates_after(step) and not saves:
                self.strategy.synchronize()
                self._evaluate(self.eval_data, step + 1)
        self.strategy.synchronize()
        if steps:
            # After `synchronize` no rank is behind, under any strategy.
            self.checkpoint(self.total_steps, False)
        return StopOrder.NONE

    def _unreported_share(self) -> Share | None:
        """Return this rank's share of the step before `start`, if it is not reported yet."""
        computed, self.strategy.pending_share = self.strategy.pending_share, None
        if self.strategy.replayed is not None:
            return self.strategy.replayed
        return computed[1] if computed is not None and computed[0] == self.start - 1 else None

    def _stop_order(self, step: int) -> StopOrder:
        stop_order = self.stop(step)
        if stop_order is StopOrder.ABANDON:
            raise Abandoned("this worker was told to stop between two steps")
        if self.job.scaling.world == 1:
            self._agreed = stop_order
        return stop_order

    def _stop(self, step: int) -> StopOrder:
        """Stop before this step; if the run ends here, evaluate as after a last step."""
        if self._agreed is StopOrder.SAVE and step > self.checkpoint_step:
            self._take_checkpoint(step, True)
        if self._agreed is not StopOrder.RESIZE:
            self.strategy.synchronize()
        if self._agreed is StopOrder.END:
            evaluated = step == 0 or self._evaluates_after(step - 1)
            if self.eval_data is not None and not evaluated:
                self._evaluate(self.eval_data, step)
        return self._agreed

    def _take_checkpoint(self, steps: int, saves: bool) -> None:
        self.checkpoint(steps, saves)
        if saves:
            self.checkpoint_step = steps

    def _step(self, step: int, stop_order: StopOrder) -> None:
        self._exchange.begin()
        clock = Stopwatch()
        with self.gathering.begin(step), self.state.compute_on_copy(), self.flat.process:
            share = self.compute.gradients(step, clock)
        self.gathering.finish(self.flat.params.device)
        self.flat.check_layout(step)
        self.strategy.pending_share = step, share
        total = self._exchange.exchange(step, share, number=step, stop=stop_order)
        self._agreed = total.stop
        clock.lap("exchange")
        self.strategy.update(step, total)
        clock.lap("update")
        self._end_step(step, share, clock)

    def _end_step(self, step: int, share: Share, clock: Stopwatch) -> None:
        self.flat.version = self.progress.step = step + 1
        self.progress.beat()
        self._report_step(self.rank, step, share, clock, {})
        self.strategy.pending_share = None

    def _skip(self, step: int) -> None:
        """Skip a step that the other ranks have already applied."""
        clock = Stopwatch()
        self.compute.skip(step)
        clock.lap("data")
        self._end_step(step, Share(), clock)

    def _evaluates_at_start(self) -> bool:
        if self.start:
            return self._evaluates_after(self.start - 1)  # it may have been interrupted
        return self.job.evaluation.before_first

    def _evaluates_after(self, step: int) -> bool:
        return step + 1 == self.total_steps or self._is_period(step + 1)

    def _is_period(self, steps: int) -> bool:
        """Return whether the job's evaluation period ends after this number of steps."""
        every = self.job.evaluation.period(self.sampler.steps_per_epoch)
        return every > 0 and steps % every == 0

    def _evaluate(self, data: Dataset[Any], step: int) -> None:
        """Evaluate this rank's part of the data; the controller merges the parts."""
        self.progress.evaluating = True
        sums = self._run_evaluation(partial(self.compute.evaluate, data))
        self._merge_states(sums)
        self.progress.evaluating = False
        report = EvalReport(self.rank, step, sums.samples, sums.sums, sums.counts)
        parts = [report]
        if self.group is not None:
            every = gather_values(asdict(report), self.group, self.flat.params.device)
            parts = [EvalReport(**fields) for fields in every]
        for part in parts:
            self.report(part)
        # An evaluation only at the end would not exist in a longer run, as which this may resume.
        if self.job.plateau is not None and self._is_period(step):
            self.job.plateau.evaluated(step, join_evals(parts).metrics)

    def _merge_states(self, sums: Sums) -> None:
        """Compute metrics with state over all ranks' data, and add them to the sums of rank 0."""
        if not self.metrics.found():
            return
        parts = self.metrics.gathered(sums.states, self.flat.params.device)
        if self.rank == 0:
            with self.flat.process:
                figures = self.metrics.figures(parts)
            sums.put(figures)


def task_plan(job: Job, sampler: Sampler, steps: int, first: int, evaluates: bool) -> TaskPlan:
    """
    Return the task scheduler's plan of a run: steps, tasks per step, evaluations.

    Args:
        job: the job.
        sampler: order of the data; its world is the number of tasks per step.
        steps: number of steps of the run.
        first: number of steps that are done.
        evaluates: whether the task has evaluation data.
    """
    if not evaluates:
        return TaskPlan(steps, sampler.world, first)
    every = min(job.evaluation.period(sampler.steps_per_epoch) or steps, steps)
    # An evaluation at the first step may have been interrupted.
    begin = -(-max(1, first) // every) * every
    begin = 0 if job.evaluation.before_first and first == 0 else begin
    if steps == UNBOUNDED:  # too many for a list; the last one is known at the run's end
        return TaskPlan(steps, sampler.world, first, range(begin, steps + 1, every))
    return TaskPlan(steps, sampler.world, first, (*range(begin, steps, every), steps))


@dataclass
class LeasedLoop(_LoopBase):
    """Trains one worker's model on tasks that the task scheduler leases to the worker."""

    compute: TaskModel
    leases: Leases

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._pushes = 0  #: number of the next push in this attempt

    def run(self) -> StopOrder:
        """Train leased tasks until the task scheduler ends the run."""
        try:
            self._work()
        finally:
            self.compute.close()
        return StopOrder.NONE

    def _work(self) -> None:
        self.progress.step = self._offered = self.start
        self.progress.begun = True
        self._final, self._idle_s = False, 0.0
        while not (lease := self._next_lease()).over:
            self._take_final_parameters(lease)
            for version, part in lease.evaluations:
                self._evaluate(version, part)
            self.compute.read(lease.tasks)
            for task in lease.tasks:
                self._train_task(task)
            self._offer_checkpoints(lease.reach)
        self._take_final_parameters(lease)
        self.progress.left = not lease.trained

    def _next_lease(self) -> Lease:
        start = time.perf_counter()
        lease = self.leases.next(self.progress.beat)
        self._idle_s += time.perf_counter() - start
        return lease

    def _train_task(self, task: int) -> None:
        self._exchange.begin()
        clock = Stopwatch()
        with self.gathering, self.state.compute_on_copy(), self.flat.process:
            share = self.compute.gradients(task, clock)
        step, part = divmod(task, self.sampler.world)
        self.flat.check_layout(step)
        total = self._exchange.exchange(step, share, number=self._pushes, task=task)
        self._pushes += 1
        clock.lap("exchange")
        self.strategy.update(task, total)
        clock.lap("update")
        self.leases.finish((task,))
        self.progress.step = max(self.progress.step, step + 1)
        self.flat.version = self.progress.step
        self.progress.beat()
        idle_s, self._idle_s = self._idle_s, 0.0
        self._report_step(part, step, share, clock, {"lease_s": idle_s})

    def _take_final_parameters(self, lease: Lease) -> None:
        """Fetch the final parameters once all tasks are done; offer the last checkpoints."""
        if not lease.trained or (self._final and not lease.saves):
            return
        if not self._final:
            self._final = True
            self.strategy.synchronize()
            self.progress.step = self.flat.version = lease.steps
        if self.rank == 0 and self.checkpoint_step < lease.steps:
            self._offer_checkpoints(lease.steps - 1)
            self.checkpoint(lease.steps, lease.saves)

    def _evaluate(self, version: int, part: int) -> None:
        assert self.eval_data is not None, "the plan has evaluations only if there is data"
        if not self._final:
            self.strategy.synchronize()
        self.progress.evaluating = True
        sums = self._run_evaluation(partial(self.compute.evaluate_part, self.eval_data, part))
        self.progress.evaluating = False
        self.report(EvalReport(part, version, sums.samples, sums.sums, sums.counts))
        self.leases.finish((), ((version, part),))
        self.progress.beat()

    def _offer_checkpoints(self, reach: int) -> None:
        """Fetch checkpoints early on rank 0: shards retain only the newest versions."""
        if self.rank == 0:
            for version in range(self._offered + 1, min(reach, self.total_steps - 1) + 1):
                self.checkpoint(version, False)
                self._offered = version
