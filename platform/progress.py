"""What happened in a run, put together from what its ranks report, in the order of the steps."""

from dataclasses import dataclass, field
from typing import TypeVar


@dataclass(frozen=True)
class StepReport:
    """One rank's part of one step."""

    rank: int
    step: int
    epoch: int
    loss: float
    """Mean over this rank's samples; 0 where it had none."""
    samples: int
    seconds: dict[str, float]
    """Wall time by part of the step: `data`, `compute`, `exchange`, `update`."""
    of: int = 0
    """Steps of the whole run; 0: not known."""
    figures: dict[str, float] = field(default_factory=dict)
    """The strategy's own, for example bytes on the wire."""


@dataclass(frozen=True)
class EvalReport:
    """One rank's part of one evaluation."""

    rank: int
    step: int
    """Steps done before it."""
    samples: int
    sums: dict[str, float]
    """Figure -> sum over this rank's samples."""


@dataclass(frozen=True)
class StepSummary:
    """One step over all ranks."""

    step: int
    epoch: int
    loss: float
    """Mean over the samples of all ranks."""
    samples: int
    seconds: dict[str, float]
    """By part of the step, the slowest rank's; so the parts may add up to more than the step."""
    of: int = 0
    """Steps of the whole run; 0: not known."""
    figures: dict[str, float] = field(default_factory=dict)
    """The strategy's own; of each the largest over the ranks."""


@dataclass(frozen=True)
class EvalSummary:
    """One evaluation over all ranks."""

    step: int
    samples: int
    metrics: dict[str, float]


Report = TypeVar("Report", StepReport, EvalReport)


class Gathering:
    """Joins the reports of all ranks; a step is given out once, when its last rank reported."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._steps: dict[int, list[StepReport]] = {}
        self._evals: dict[int, list[EvalReport]] = {}

    def add(self, report: StepReport | EvalReport) -> StepSummary | EvalSummary | None:
        """Take one report; give the summary that it completes, if any."""
        if isinstance(report, StepReport):
            steps = self._complete(self._steps, report)
            return _join_steps(steps) if steps else None
        evals = self._complete(self._evals, report)
        return _join_evals(evals) if evals else None

    def _complete(self, waiting: dict[int, list[Report]], report: Report) -> list[Report]:
        """Give the reports of all ranks, in rank order so that sums repeat; empty: some miss."""
        reports = waiting.setdefault(report.step, [])
        reports.append(report)
        if len(reports) < self.world:
            return []
        return sorted(waiting.pop(report.step), key=lambda r: r.rank)


def _join_steps(reports: list[StepReport]) -> StepSummary:
    first = reports[0]
    samples = sum(r.samples for r in reports)
    loss = sum(r.loss * r.samples for r in reports) / samples
    slowest = {part: max(r.seconds[part] for r in reports) for part in first.seconds}
    names = dict.fromkeys(name for r in reports for name in r.figures)
    figures = {name: max(r.figures.get(name, 0.0) for r in reports) for name in names}
    return StepSummary(first.step, first.epoch, loss, samples, slowest, first.of, figures)


def _join_evals(reports: list[EvalReport]) -> EvalSummary:
    samples = sum(r.samples for r in reports)
    names = next((r.sums for r in reports if r.samples), {})
    means = {name: sum(r.sums.get(name, 0.0) for r in reports) / samples for name in names}
    return EvalSummary(reports[0].step, samples, means)
