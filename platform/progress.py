"""
Aggregates the reports of all ranks into summaries, in the order of the steps.

Ranks count finished steps, so reports start at step 0. Summaries, and everything derived from them,
count from 1: step n is the n-th update. The numbers change where reports become summaries.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from distplat.platform.pipeline_trace import Trace, TraceReport, join_traces

UNBOUNDED = 1 << 40
"""Number of steps of a run that ends by time only: more than any run can do."""


@dataclass(frozen=True)
class StepReport:
    """One rank's report of one step."""

    rank: int
    """The rank; where tasks are leased, the part of the step, whichever worker computed it."""
    step: int
    """Step, from 0."""
    epoch: int
    """Epoch, from 0."""
    loss: float
    """Mean over this rank's samples, weighted by `weight`; 0 without samples."""
    samples: int
    seconds: dict[str, float]
    """Wall time by phase of the step: `data`, `compute`, `exchange`, `update`."""
    of: int = 0
    """Steps of the whole run; 0: unknown."""
    figures: dict[str, float] = field(default_factory=dict)
    """The strategy's own metrics, for example bytes sent."""
    weight: float | None = None
    """Total weight of the loss's mean; None: the number of samples."""


@dataclass(frozen=True)
class EvalReport:
    """One rank's report of one evaluation."""

    rank: int
    step: int
    """Steps done before the evaluation."""
    samples: int
    sums: dict[str, float]
    """Metric -> sum over this rank's samples."""
    counts: dict[str, float] = field(default_factory=dict)
    """Metric -> samples in its sum, from the batches that returned it; missing: all samples."""


@dataclass(frozen=True)
class StepSummary:
    """One step over all ranks."""

    step: int
    """Step, from 1: the n-th update."""
    epoch: int
    """Epoch, from 0."""
    loss: float
    """Mean over the samples of all ranks."""
    samples: int
    seconds: dict[str, float]
    """By phase, the time of the slowest rank; the phases may add up to more than the step."""
    of: int = 0
    """Steps of the whole run; 0: unknown."""
    figures: dict[str, float] = field(default_factory=dict)
    """The strategy's own metrics; the largest value over the ranks."""


def reported_metrics(step: StepSummary) -> dict[str, float]:
    """Return the metrics that a train function reported; a NaN loss counts as not reported."""
    loss = {} if math.isnan(step.loss) else {"loss": step.loss}
    return {**step.figures, **loss}


class StepTotals:
    """Sums over the steps of a run, in constant memory."""

    def __init__(self) -> None:
        self.steps = self.samples = 0
        self.seconds: dict[str, float] = {}  #: by phase, see `StepSummary`
        self._first: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}  #: metric -> (sum, number of steps)

    def add(self, step: StepSummary) -> None:
        """Add a step."""
        self.steps += 1
        self.samples += step.samples
        for part, seconds in step.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        if self.steps == 1:
            self._first = step.figures
            return
        for name, value in step.figures.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    @property
    def figures(self) -> dict[str, float]:
        """
        Mean of each metric over the steps that report it.

        The first step is excluded if there are others: ranks connect and touch memory for the first
        time.
        """
        if self.steps == 1:
            return dict(self._first)
        return {name: total / count for name, (total, count) in self._sums.items()}


def steps_text(steps: int) -> str:
    """Format the number of steps; a train function may report none."""
    return str(steps) if steps else "0 reported"


@dataclass(frozen=True)
class EvalSummary:
    """One evaluation over all ranks."""

    step: int
    """Steps done before the evaluation; 0: before the first step."""
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class FailureEvent:
    """A failure that the run recovers from."""

    attempt: int
    """Number of the next attempt."""
    step: int
    """Steps done and kept."""
    cause: str
    replaced: tuple[str, ...]
    """Roles whose processes are replaced."""
    wait_s: float
    """Delay before the next attempt."""


@dataclass(frozen=True)
class Recovery:
    """All ranks work again after a failure."""

    attempt: int
    seconds: float
    """Time since the failure was detected."""


@dataclass(frozen=True)
class Resized:
    """The run continues with another number of workers."""

    attempt: int
    """Number of the first attempt with the new workers."""
    step: int
    """The first step with the new workers, from 1."""
    before: int
    """Workers before."""
    workers: int
    seconds: float
    """Time from the first worker that stopped until all workers ran again."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written to disk."""

    step: int
    """Steps done at the checkpoint."""
    path: str
    size: int
    """Size in bytes."""
    seconds: float
    """Time from the last rank's part until the checkpoint was on disk; training continued
    meanwhile."""


@dataclass(frozen=True)
class Best:
    """A new best checkpoint."""

    step: int
    """Steps done at the checkpoint."""
    path: str
    metric: str
    """Metric by which checkpoints are compared."""
    figure: float
    """Value of the metric at this step."""


@dataclass(frozen=True)
class EarlyStopReached:
    """Evaluations did not improve within the patience of `early_stop`: the run is to end."""

    step: int
    """Step of the last evaluation."""
    reason: str


AnyReport = StepReport | EvalReport | TraceReport
"""Report of a rank."""

Summary = (
    StepSummary
    | EvalSummary
    | Trace
    | FailureEvent
    | Recovery
    | Resized
    | Saved
    | Best
    | EarlyStopReached
)
"""Event of a run, for display, metrics.jsonl and callbacks."""
KINDS = {
    "step": StepSummary,
    "evaluation": EvalSummary,
    "failure": FailureEvent,
    "recovery": Recovery,
    "resized": Resized,
    "checkpoint": Saved,
    "best checkpoint": Best,
    "early stop": EarlyStopReached,
}
"""Summary classes by `kind`, as in metrics.jsonl."""

_MAX_EMITTED = 10_000
"""Evaluations in any order that are remembered, to drop repeats."""

Report = TypeVar("Report", StepReport, EvalReport, TraceReport)


def resize_text(resized: Resized) -> str:
    """Format a resize: `4 workers from step 120 on, ...`."""
    count = f"{resized.workers} worker" + ("s" if resized.workers > 1 else "")
    return f"{count} from step {resized.step} on, stood still {resized.seconds:.1f} s"


def first_line(text: str) -> str:
    """Return the first line of a cause, or a placeholder if it is empty."""
    lines = text.strip().splitlines()
    return lines[0] if lines else "no cause is known"


def to_json(value: object, indent: int | None = 2) -> str:
    """Serialize to JSON; non-finite numbers, such as a diverged loss, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number_text(value: float | None) -> str:
    """`0.1234`, or `not a number`."""
    return "not a number" if value is None or math.isnan(value) else f"{value:.4g}"


class ReportAggregator:
    """
    Joins the reports of all ranks, and emits each step and evaluation once, in order.

    A step is emitted when its last rank has reported it. A rank may be lost before it reports a
    step that it has done. Such a step is emitted without that report once a later step is complete,
    or at the end. A step that is repeated after a restart is emitted once.

    An evaluation waits for the earlier steps with missing reports.

    Where tasks are leased, a later step may be complete before an earlier one, and waits for it. A
    later evaluation does not wait for an earlier one.

    Args:
        world: number of ranks, or of parts of a step.
        first: first step, where tasks are leased; None: ranks do one step after the other.
    """

    def __init__(self, world: int, first: int | None = None) -> None:
        self._next_step = first
        self._lost_before = 0  #: reports of steps before this one may be lost
        self._steps = _PendingReports[StepReport](world)
        self._evals = _PendingReports[EvalReport](world, in_order=first is None)
        self._traces = _PendingReports[TraceReport](world)
        self._pending_evals: list[EvalSummary] = []  #: complete, but earlier steps are not

    def add(self, report: AnyReport) -> list[StepSummary | EvalSummary | Trace]:
        """Add a report; return the summaries that it completes, oldest first."""
        if isinstance(report, TraceReport):
            traces = self._traces.add(report)
            return [join_traces(traces)] if traces else []
        if isinstance(report, StepReport):
            if self._next_step is not None:
                return self._in_turn(report, self._next_step)
            steps = self._steps.add(report)
            if not steps:
                return []
            return [*self._incomplete_steps(report.step), _join_steps(steps), *self._ready_evals()]
        # A rank may report an evaluation for another: it does not show which ranks reported a step.
        if evaluations := self._evals.add(report):
            self._pending_evals.append(join_evals(evaluations))
        return [*self._ready_evals()]

    def resize(self, world: int, step: int) -> None:
        """
        Change the number of ranks from a step on; partial reports of later steps are dropped.

        Args:
            world: new number of ranks.
            step: number of finished steps.
        """
        for reports in (self._steps, self._evals, self._traces):
            reports.resize(world, step)

    def rank_lost(self) -> None:
        """Record that a rank was lost: its missing reports will never arrive."""
        self._lost_before = self._steps.highest + 1

    def _in_turn(self, report: StepReport, turn: int) -> list[StepSummary | EvalSummary | Trace]:
        summaries: list[StepSummary | EvalSummary | Trace] = []
        complete = self._steps.put(report)
        if complete and turn < self._lost_before <= report.step:
            summaries += self._incomplete_steps(self._lost_before)
            turn = self._lost_before
        while steps := self._steps.complete(turn):
            summaries.append(_join_steps(steps))
            turn += 1
        self._next_step = turn
        return summaries

    def flush(self) -> list[StepSummary | EvalSummary]:
        """Return the remaining steps and evaluations at the end of the run."""
        return [*self._incomplete_steps(None), *self._ready_evals()]

    def _ready_evals(self) -> list[EvalSummary]:
        """Return the evaluations that no longer wait for a step."""
        oldest = None if self._next_step is not None else self._steps.oldest
        free = [held for held in self._pending_evals if oldest is None or held.step <= oldest]
        self._pending_evals = [held for held in self._pending_evals if held not in free]
        return free

    def _incomplete_steps(self, before: int | None) -> list[StepSummary | EvalSummary]:
        return [_join_steps(reports) for reports in self._steps.before(before)]


class _PendingReports(Generic[Report]):
    """
    Incomplete reports of one class, by step and rank.

    Args:
        world: reports per step.
        in_order: whether no report of a step can arrive after a later step was emitted, except a
            repeat.
    """

    def __init__(self, world: int, *, in_order: bool = True) -> None:
        self._in_order = in_order
        self._emitted: set[int] = set()  #: recently emitted steps, if not in order
        self._worlds = [(0, world)]  #: (first step, reports per step), ascending
        self._by_step: dict[int, dict[int, Report]] = {}
        self._next = 0  #: reports of earlier steps are repeats
        self.highest = -1  #: the last step with a report

    @property
    def oldest(self) -> int | None:
        """The first incomplete step with reports, or None."""
        return min(self._by_step, default=None)

    def resize(self, world: int, step: int) -> None:
        """Change the number of reports per step from `step` on, and drop reports of these steps."""
        self._worlds = [(first, count) for first, count in self._worlds if first < step]
        self._worlds.append((step, world))
        self._by_step = {s: reports for s, reports in self._by_step.items() if s < step}

    def _is_complete(self, step: int) -> bool:
        world = next(world for first, world in reversed(self._worlds) if first <= step)
        return len(self._by_step.get(step, {})) == world

    def add(self, report: Report) -> list[Report]:
        """Add a report; return all reports of its step in rank order, or [] if some are missing."""
        return self._pop(report.step) if self.put(report) else []

    def put(self, report: Report) -> bool:
        """Add a report; return whether its step is complete and was not emitted before."""
        if report.step in self._emitted or report.step < self._next:
            return False
        self.highest = max(self.highest, report.step)
        self._by_step.setdefault(report.step, {})[report.rank] = report
        return self._is_complete(report.step)

    def complete(self, step: int) -> list[Report]:
        """Return all reports of a step, or [] if some are missing."""
        return self._pop(step) if self._is_complete(step) else []

    def before(self, step: int | None) -> list[list[Report]]:
        """Return the reports of all steps before this one, oldest first; None: of all steps."""
        older = sorted(s for s in self._by_step if step is None or s < step)
        return [self._pop(s) for s in older]

    def _pop(self, step: int) -> list[Report]:
        reports = self._by_step.pop(step)
        if self._in_order:
            self._next = max(self._next, step + 1)
            return [reports[rank] for rank in sorted(reports)]
        self._emitted.add(step)
        if len(self._emitted) >= 2 * _MAX_EMITTED:
            last = sorted(self._emitted)[-_MAX_EMITTED:]
            self._next, self._emitted = last[0], set(last)
            self._by_step = {s: newer for s, newer in self._by_step.items() if s >= last[0]}
        return [reports[rank] for rank in sorted(reports)]


def _join_steps(reports: list[StepReport]) -> StepSummary:
    first = reports[0]
    samples = sum(r.samples for r in reports)
    weights = [r.samples if r.weight is None else r.weight for r in reports]
    losses = [r.loss * weight for r, weight in zip(reports, weights, strict=True) if weight]
    loss = sum(losses) / (sum(weights) or 1.0)
    slowest = {part: max(r.seconds[part] for r in reports) for part in first.seconds}
    names = dict.fromkeys(name for r in reports for name in r.figures)
    figures = {name: max(r.figures.get(name, 0.0) for r in reports) for name in names}
    return StepSummary(first.step + 1, first.epoch, loss, samples, slowest, first.of, figures)


def join_evals(reports: Sequence[EvalReport]) -> EvalSummary:
    """
    Merge the reports of one evaluation, given in rank order.

    The mean of a metric is over the samples of the batches that returned it, on all ranks; NaN if
    their weights are 0.
    """
    names = dict.fromkeys(name for r in reports for name in r.sums)
    means = {}
    for name in names:
        reporting = [r for r in reports if name in r.sums]
        count = sum(r.counts.get(name, r.samples) for r in reporting)
        means[name] = sum(r.sums[name] for r in reporting) / count if count else math.nan
    return EvalSummary(reports[0].step, sum(r.samples for r in reports), means)
