"""
What happened in a run, put together from what its ranks report, in the order of the steps.

Ranks count the steps that they have behind them, so in what they report the first one is step 0.
People count steps: in a summary, and in all that is shown of it, step n is the n-th update. The
numbers change here, where reports become summaries.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from distplat.platform.pipeline_trace import Trace, TraceReport, join_traces

UNBOUNDED = 1 << 40
"""Steps of a run that only its time ends: none makes so many."""


@dataclass(frozen=True)
class StepReport:
    """One rank's part of one step."""

    rank: int
    """Whose; where tasks are leased, which part of the step it is, whoever made it."""
    step: int
    """From 0."""
    epoch: int
    """From 0."""
    loss: float
    """Mean over this rank's weights; 0 where it had none."""
    samples: int
    seconds: dict[str, float]
    """Wall time by part of the step: `data`, `compute`, `exchange`, `update`."""
    of: int = 0
    """Steps of the whole run; 0: not known."""
    figures: dict[str, float] = field(default_factory=dict)
    """The strategy's own, for example bytes on the wire."""
    weight: float | None = None
    """What the loss is a mean over; None: the samples."""


@dataclass(frozen=True)
class EvalReport:
    """One rank's part of one evaluation."""

    rank: int
    step: int
    """Steps done before it."""
    samples: int
    sums: dict[str, float]
    """Figure -> sum over this rank's samples."""
    counts: dict[str, float] = field(default_factory=dict)
    """Figure -> samples in its sum, those of the batches that gave it; not there: all samples."""


@dataclass(frozen=True)
class StepSummary:
    """One step over all ranks."""

    step: int
    """From 1: the n-th update."""
    epoch: int
    """From 0."""
    loss: float
    """Mean over the samples of all ranks."""
    samples: int
    seconds: dict[str, float]
    """By part of the step, the slowest rank's; so the parts may add up to more than the step."""
    of: int = 0
    """Steps of the whole run; 0: not known."""
    figures: dict[str, float] = field(default_factory=dict)
    """The strategy's own; of each the largest over the ranks."""


def reported_metrics(step: StepSummary) -> dict[str, float]:
    """Give the figures that a train function has reported; a loss that is NaN may be none."""
    loss = {} if math.isnan(step.loss) else {"loss": step.loss}
    return {**step.figures, **loss}


class StepTotals:
    """Sums over the steps of a run: so much memory however many steps there are."""

    def __init__(self) -> None:
        self.steps = self.samples = 0
        self.seconds: dict[str, float] = {}  #: by part of the step, see `StepSummary`
        self._first: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}  #: figure -> its sum, and of how many steps

    def add(self, step: StepSummary) -> None:
        """Take one more step."""
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
        Give each figure's mean over the steps that have it.

        The first step is left out where there are others: in it ranks meet and memory is touched
        first.
        """
        if self.steps == 1:
            return dict(self._first)
        return {name: total / count for name, (total, count) in self._sums.items()}


def steps_text(steps: int) -> str:
    """Give a run's steps for people to read: a train function may train and report none."""
    return str(steps) if steps else "0 reported"


@dataclass(frozen=True)
class EvalSummary:
    """One evaluation over all ranks."""

    step: int
    """The one that it comes after; 0: before the first."""
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class FailureEvent:
    """A failure after which the run goes on."""

    attempt: int
    """Number of the attempt that begins."""
    step: int
    """Steps done: the last one that need not be made again."""
    cause: str
    replaced: tuple[str, ...]
    """Roles that are made anew."""
    wait_s: float
    """Pause before the attempt begins."""


@dataclass(frozen=True)
class Recovery:
    """All ranks are at work again."""

    attempt: int
    seconds: float
    """Since the failure was noticed."""


@dataclass(frozen=True)
class Resized:
    """The run goes on with another number of workers."""

    attempt: int
    """Number of the attempt that began with them."""
    step: int
    """The first that they make, from 1."""
    before: int
    """Workers that there were."""
    workers: int
    seconds: float
    """From the first worker that stopped until all were at work."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    """Steps that it has behind it."""
    path: str
    size: int
    """Bytes."""
    seconds: float
    """From the last rank's part to the disk; training went on meanwhile."""


@dataclass(frozen=True)
class Best:
    """Another checkpoint is the best one now."""

    step: int
    """Steps that it has behind it."""
    path: str
    metric: str
    """What it is judged by."""
    figure: float
    """That the evaluation of this step gave."""


@dataclass(frozen=True)
class EarlyStopReached:
    """Evaluations got no better for as long as `early_stop` has patience: the run is to end."""

    step: int
    """That the last of them comes after."""
    reason: str


AnyReport = StepReport | EvalReport | TraceReport
"""What a rank reports."""

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
"""What is told of a run while it goes on."""
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
"""By `kind` of a line of metrics.jsonl."""

_GIVEN = 10_000
"""Evaluations that come in any order: so many are told from those that are made again."""

Report = TypeVar("Report", StepReport, EvalReport, TraceReport)


def resize_text(one: Resized) -> str:
    """Say how many workers there are from which step on: `4 workers from step 120 on, ...`."""
    count = f"{one.workers} worker" + ("s" if one.workers > 1 else "")
    return f"{count} from step {one.step} on, stood still {one.seconds:.1f} s"


def first_line(text: str) -> str:
    """Give the first line of a cause; words where it has none."""
    lines = text.strip().splitlines()
    return lines[0] if lines else "no cause is known"


def to_json(value: object, indent: int | None = 2) -> str:
    """Write JSON; a number that is not finite, such as a diverged loss, becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number_text(value: float | None) -> str:
    """`0.1234`; words where it is no number."""
    return "not a number" if value is None or math.isnan(value) else f"{value:.4g}"


class ReportAggregator:
    """
    Joins the reports of all ranks; each step and evaluation is given out once, in order.

    A step is given out when its last rank has reported it. Where a rank was lost between its part
    and its report, that report never comes: then the step is given out without it, as soon as a
    later step is complete, or at the end. What is done again after a restart is given out once.

    An evaluation waits for the steps before it of which a rank's report is still to come.

    Where tasks are leased, later steps may be complete before earlier ones, which wait their turn.
    Evaluations do not: there a later one may be given out first.

    Args:
        world: number of ranks, or of a step's parts.
        first: of the steps, where tasks are leased; None: ranks make one step after the other.
    """

    def __init__(self, world: int, first: int | None = None) -> None:
        self._next_step = first
        self._lost_before = 0  #: of steps before this one, reports may have been lost
        self._steps = _Waiting[StepReport](world)
        self._evals = _Waiting[EvalReport](world, in_order=first is None)
        self._traces = _Waiting[TraceReport](world)
        self._pending_evals: list[EvalSummary] = []  #: complete, but steps before them are not

    def add(self, report: AnyReport) -> list[StepSummary | EvalSummary | Trace]:
        """Take one report; give the summaries that it completes, oldest first."""
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
        # Ranks may report an evaluation for each other: it says nothing of who reported which step.
        if evaluations := self._evals.add(report):
            self._pending_evals.append(join_evals(evaluations))
        return [*self._ready_evals()]

    def resize(self, world: int, step: int) -> None:
        """
        Called when the number of ranks changes from a step on; what there is of it is made anew.

        Args:
            world: ranks.
            step: steps that are done.
        """
        for reports in (self._steps, self._evals, self._traces):
            reports.resize(world, step)

    def rank_lost(self) -> None:
        """Called when a rank was lost: what it had done and not yet reported never comes."""
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
        """Give what is left of the steps when the run is over."""
        return [*self._incomplete_steps(None), *self._ready_evals()]

    def _ready_evals(self) -> list[EvalSummary]:
        """Give the evaluations that wait for no step any more."""
        oldest = None if self._next_step is not None else self._steps.oldest
        free = [held for held in self._pending_evals if oldest is None or held.step <= oldest]
        self._pending_evals = [held for held in self._pending_evals if held not in free]
        return free

    def _incomplete_steps(self, before: int | None) -> list[StepSummary | EvalSummary]:
        return [_join_steps(reports) for reports in self._steps.before(before)]


class _Waiting(Generic[Report]):
    """
    Reports of one kind, by step and rank, until they are complete.

    Args:
        world: reports of a step.
        in_order: nothing comes of a step before one that was given out, unless it is made again.
    """

    def __init__(self, world: int, *, in_order: bool = True) -> None:
        self._in_order = in_order
        self._emitted: set[int] = set()  #: steps that were given out, where they come in any order:
        # the last ones, for a run may have very many
        self._worlds = [(0, world)]  #: from which step on how many reports are all, ascending
        self._by_step: dict[int, dict[int, Report]] = {}
        self._next = 0  #: nothing comes of a step before this one
        self.highest = -1  #: the last step of which there is a report

    @property
    def oldest(self) -> int | None:
        """The first step of which there are reports, and not all; None: there is none."""
        return min(self._by_step, default=None)

    def resize(self, world: int, step: int) -> None:
        """From this step on so many reports are all; those that there are of it do not count."""
        self._worlds = [one for one in self._worlds if one[0] < step] + [(step, world)]
        self._by_step = {s: reports for s, reports in self._by_step.items() if s < step}

    def _whole(self, step: int) -> bool:
        world = next(world for first, world in reversed(self._worlds) if first <= step)
        return len(self._by_step.get(step, {})) == world

    def add(self, report: Report) -> list[Report]:
        """Give the reports of all ranks, in rank order so that sums repeat; empty: some miss."""
        return self._take(report.step) if self.put(report) else []

    def put(self, report: Report) -> bool:
        """Take a report; say whether its step is complete, and was not given out."""
        if report.step in self._emitted or report.step < self._next:
            return False
        self.highest = max(self.highest, report.step)
        self._by_step.setdefault(report.step, {})[report.rank] = report
        return self._whole(report.step)

    def complete(self, step: int) -> list[Report]:
        """Give the reports of a step, if all are there; empty: some miss."""
        return self._take(step) if self._whole(step) else []

    def before(self, step: int | None) -> list[list[Report]]:
        """Give what there is of all steps before this one, oldest first; None: of all."""
        older = sorted(s for s in self._by_step if step is None or s < step)
        return [self._take(s) for s in older]

    def _take(self, step: int) -> list[Report]:
        reports = self._by_step.pop(step)
        if self._in_order:
            self._next = max(self._next, step + 1)
            return [reports[rank] for rank in sorted(reports)]
        self._emitted.add(step)
        if len(self._emitted) >= 2 * _GIVEN:
            last = sorted(self._emitted)[-_GIVEN:]
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
    Put the parts of an evaluation together, which are in rank order.

    A figure's mean is over the samples of the batches that gave it, on whatever rank.
    """
    names = dict.fromkeys(name for r in reports for name in r.sums)
    means = {}
    for name in names:
        reporting = [r for r in reports if name in r.sums]
        count = sum(r.counts.get(name, r.samples) for r in reporting)
        means[name] = sum(r.sums[name] for r in reporting) / (count or 1.0)
    return EvalSummary(reports[0].step, sum(r.samples for r in reports), means)
