"""
Computes the figures of a run report, independent of their display.

    record (run_record.py)  ->  Report  ->  a page, a table, JSON (cli/)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from distplat.platform.progress import EvalSummary, FailureEvent, Recovery, StepSummary
from distplat.platform.run_record import RunRecord

SILENT_S = 120.0
"""A run without a new line for this long counts as silent, unless its job has a longer step
timeout."""


@dataclass(frozen=True)
class Status:
    """Status of a run."""

    word: str
    """`SUCCEEDED`, `FAILED`, ... from its result; else `RUNNING` or `UNKNOWN`."""
    detail: str
    """Explanation in a sentence, if needed."""
    error: str = ""
    """The error that ended the run, as printed."""


@dataclass(frozen=True)
class PhaseTime:
    """Time of one phase of a step: `data`, `compute`, `exchange`, `update`."""

    name: str
    total_s: float
    share: float
    """Share of the total time of all phases, 0 to 1."""
    median_s: float
    """Median over the steps, without the first step."""
    p95_s: float


@dataclass(frozen=True)
class FigureRow:
    """Statistics of one of a strategy's metrics over the run."""

    name: str
    mean: float
    """Mean without the first step, in which ranks connect."""
    least: float
    most: float
    last: float


@dataclass(frozen=True)
class Metric:
    """Curve of one metric of the evaluations."""

    name: str
    points: tuple[tuple[int, float], ...]
    """(steps done, value) of each evaluation."""


@dataclass(frozen=True)
class RestartRecord:
    """A failure that the run recovered from, and the recovery."""

    failure: FailureEvent
    recovery: Recovery | None
    """None: it failed, or is not complete yet."""


def status_of(record: RunRecord, now_s: float) -> Status:
    """
    Return the status of a run.

    Args:
        record: of the run.
        now_s: seconds since 1970.
    """
    if record.result is not None:
        word = str(record.result.get("status", "UNKNOWN"))
        return Status(word, "", str(record.result.get("error", "")))
    silent_s = None if record.last_sign_s is None else now_s - record.last_sign_s
    if silent_s is None:
        return Status("UNKNOWN", "it has not ended by itself, and has written no metrics")
    if silent_s < _silence_limit(record):
        return Status("RUNNING", f"last line {silent_s:.0f} s ago")
    ago = f"{silent_s / 60:.0f} min" if silent_s < 7200 else f"{silent_s / 3600:.0f} h"
    return Status("UNKNOWN", f"no result; last line {ago} ago: stalled, or its driver was killed")


def _silence_limit(record: RunRecord) -> float:
    failure = record.job.get("failure")
    deadline = failure.get("step_timeout_s") if isinstance(failure, Mapping) else None
    return float(deadline) if isinstance(deadline, int | float) else SILENT_S


def phase_times(steps: Sequence[StepSummary], every: int = 1) -> list[PhaseTime]:
    """
    Return the time per phase, in the order of a step; [] without steps.

    Args:
        steps: of the run.
        every: sampling interval of the steps; 1: all steps.
    """
    names = list(dict.fromkeys(name for step in steps for name in step.seconds))
    series = {name: [_or_zero(step.seconds.get(name, 0.0)) for step in steps] for name in names}
    total_s = sum(map(sum, series.values())) or 1.0
    return [
        PhaseTime(
            name,
            sum(values) * every,
            sum(values) / total_s,
            median(values[1:] or values),
            _p95(values[1:] or values),
        )
        for name, values in series.items()
    ]


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def samples_per_s(steps: Sequence[StepSummary]) -> float | None:
    """Return samples per second of work; None without work."""
    busy = sum(_or_zero(s) for step in steps for s in step.seconds.values())
    return sum(step.samples for step in steps) / busy if busy else None


def figure_rows(steps: Sequence[StepSummary]) -> list[FigureRow]:
    """Return statistics of all metrics of the steps; non-finite values are ignored."""
    series: dict[str, list[float]] = {}
    first = {name for step in steps[:1] for name in step.figures}
    for step in steps:
        for name, value in step.figures.items():
            series.setdefault(name, []).append(value)
    rows = []
    for name, values in series.items():
        later_values = values[1:] if name in first and len(values) > 1 else values
        finite = [value for value in later_values if math.isfinite(value)]
        if finite:
            rows.append(FigureRow(name, fmean(finite), min(finite), max(finite), values[-1]))
    return rows


def metrics(evaluations: Sequence[EvalSummary]) -> list[Metric]:
    """Return each metric of the evaluations as a curve."""
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    return [
        Metric(name, tuple((e.step, e.metrics[name]) for e in evaluations if name in e.metrics))
        for name in names
    ]


def restarts(record: RunRecord) -> list[RestartRecord]:
    """Match each failure with its recovery."""
    ended = {recovery.attempt: recovery for recovery in record.recoveries}
    return [RestartRecord(failure, ended.get(failure.attempt)) for failure in record.failures]


def staleness(steps: Sequence[StepSummary]) -> Counter[int]:
    """Count the steps by their largest staleness; empty without staleness."""
    stale = [step.figures.get("staleness", math.nan) for step in steps]
    return Counter(int(value) for value in stale if math.isfinite(value))


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """
    Return centered moving means.

    Args:
        values: non-finite values are not averaged, and are returned unchanged.
        reach: neighbours on each side; near the ends fewer, the same number on both sides.
    """
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for index, value in enumerate(values):
        near = min(reach, index, len(values) - 1 - index)
        first, stop = index - near, index + near + 1
        mean = (sums[stop] - sums[first]) / max(1, counts[stop] - counts[first])
        means.append(mean if math.isfinite(value) else value)
    return means


def binned(
    steps: Sequence[StepSummary], most: int, value: Callable[[StepSummary], float]
) -> list[tuple[int, int, float]]:
    """
    Return means over ranges of steps, so that a chart has at most `most` columns.

    Returns:
        (first step, step after the last, mean) of each range; NaN where no value is finite.
    """
    size = max(1, math.ceil(len(steps) / most))
    bins = []
    for start in range(0, len(steps), size):
        chunk = steps[start : start + size]
        finite = [v for v in map(value, chunk) if math.isfinite(v)]
        mean = fmean(finite) if finite else math.nan
        bins.append((chunk[0].step, chunk[-1].step + 1, mean))
    return bins


def axis_limit(values: Iterable[float]) -> float:
    """Return the upper limit of an axis: the largest value, unless a few outliers exceed it."""
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return 0.0
    usual = finite[int(0.95 * (len(finite) - 1))] * 1.6
    return min(finite[-1], usual) if usual > 0 else finite[-1]


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
