"""
What a run makes of its evaluations: which checkpoint is the best, and whether to stop early.

The learning rate may go by them, too (`plateau.py`). The classes read no clock, no disk and talk to
nobody.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from distplat.platform.errors import Problem, SpecError, hint
from distplat.platform.fields import Count, Spec
from distplat.platform.lr_schedules import ReduceLROnPlateau

_KEPT = 1000
"""Evaluations whose figure is remembered: of later ones than the newest checkpoint, or told again
by nobody after a rollback."""


class MetricRule(Spec):
    """A figure of evaluations, and which way it gets better."""

    metric: str = Field(min_length=1)
    """Figure of an evaluation: `loss`, or a name that the task's metrics() gives; of a train
    function a figure of its reports."""
    mode: Literal["min", "max"]
    """Whether a smaller or a larger figure is better."""

    def better(self, figure: float, than: float | None, by: float = 0.0) -> bool:
        """
        Say whether a figure is better than another by more than so much; NaN is never.

        Args:
            figure: the new one.
            than: the best so far; None: there is none.
            by: at least 0.
        """
        if math.isnan(figure):
            return False
        if than is None:
            return True
        return figure < than - by if self.mode == "min" else figure > than + by


class KeepBest(MetricRule):
    """Which checkpoint stays beside the newest ones."""


class EarlyStop(MetricRule):
    """When a run ends before its last step, because evaluations get no better."""

    patience: Count = 3
    """Evaluations in a row without a better figure after which the run ends."""
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False)
    """A figure counts as better if it is by more than so much."""


class BestCheckpoint:
    """
    Which of a run's checkpoints is the best: of those after whose step there was an evaluation.

    Args:
        rule: of the job; None: none is.
    """

    def __init__(self, rule: KeepBest | None) -> None:
        self._rule = rule
        self._figures: dict[int, float] = {}  #: step -> what its evaluation gave, oldest first
        self._saved: set[int] = set()  #: steps whose checkpoints may be the best, or may become it
        self._evaluated = 0  #: the newest evaluation

    @property
    def step(self) -> int | None:
        """Of the best one, of equals the first; None: none was evaluated."""
        best: int | None = None
        for step in sorted(self._saved & self._figures.keys()):
            assert self._rule is not None, "nothing is noted without one"
            figure = self._figures[step]
            if self._rule.better(figure, None if best is None else self._figures[best]):
                best = step
        return best

    @property
    def figure(self) -> float:
        """What the evaluation of the best one gave."""
        step = self.step
        return math.nan if step is None else self._figures[step]

    @property
    def protected(self) -> set[int]:
        """Steps whose checkpoints stay: the best, and those whose evaluation is still to come."""
        best = self.step
        late = {step for step in self._saved if step > self._evaluated}
        return late if best is None else {*late, best}

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take an evaluation."""
        if self._rule is None or self._rule.metric not in metrics:
            return
        self._figures[step] = metrics[self._rule.metric]
        self._evaluated = max(self._evaluated, step)
        best = self.step
        while len(self._figures) > _KEPT:
            del self._figures[next(one for one in self._figures if one != best)]

    def saved(self, step: int) -> None:
        """A checkpoint is on the disk."""
        if self._rule is not None:
            self._saved.add(step)

    def left(self, steps: Iterable[int]) -> None:
        """No other checkpoints than these are left."""
        self._saved &= set(steps)


class EarlyStopping:
    """
    Whether evaluations still get better.

    Args:
        rule: of the job.
    """

    def __init__(self, rule: EarlyStop) -> None:
        self._rule = rule
        self._best: float | None = None
        self._best_step = 0
        self._worse = 0  #: evaluations since the best one

    @property
    def metric(self) -> str:
        """Figure that it goes by."""
        return self._rule.metric

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Take an evaluation; give why the run is to end, or None."""
        rule, figure = self._rule, metrics[self._rule.metric]
        if rule.better(figure, self._best, rule.min_delta):
            self._best, self._best_step, self._worse = figure, step, 0
            return None
        self._worse += 1
        if self._worse < rule.patience:
            return None
        since = f"since step {self._best_step}" if self._best is not None else "at all"
        return f"{rule.metric} got no better {since}, in {self._worse} evaluations"


def watching(job: Any) -> list[tuple[tuple[str, ...], str]]:
    """Give what a job decides by evaluations: the fields, and the figure that each goes by."""
    schedule = job.lr_schedule
    found: list[tuple[tuple[str, ...], MetricRule | ReduceLROnPlateau | None]] = [
        (("checkpoint", "keep_best"), job.checkpoint.keep_best),
        (("early_stop",), job.early_stop),
        (("lr_schedule",), schedule if isinstance(schedule, ReduceLROnPlateau) else None),
    ]
    return [(field, rule.metric) for field, rule in found if rule is not None]


def evaluation_problems(job: Any) -> list[Problem]:
    """Name what is wrong with what a job decides by evaluations, as far as it shows it itself."""
    evaluation = job.evaluation
    if evaluation.every_steps is None and evaluation.every_epochs == 0:
        text = "needs evaluations while the run goes on, and there is one at its end only"
        advice = "set `evaluation.every_epochs`"
        return [Problem(field, text, advice) for field, _ in watching(job)]
    return _keep_best_problems(job)


def _keep_best_problems(job: Any) -> list[Problem]:
    chosen, evaluation = job.checkpoint, job.evaluation
    if chosen.keep_best is None:
        return []
    if not chosen.wanted:
        text = "has no effect without `every_steps` or `every_epochs`"
        return [Problem(("checkpoint", "keep_best"), text, "give one of them")]
    if chosen.every_steps is not None and evaluation.every_steps is not None:
        return period_problems(chosen.every_steps, evaluation.every_steps)
    if chosen.every_epochs is not None and evaluation.every_steps is None:
        return period_problems(chosen.every_epochs, evaluation.every_epochs)
    return []


def check_metrics(job: Any, metrics: Mapping[str, float]) -> None:
    """
    See whether an evaluation gives what a job decides by.

    Args:
        job: the run's.
        metrics: of an evaluation.

    Raises:
        SpecError: it does not.
    """
    found = [
        Problem((*field, "metric"), f"the evaluation gives no {metric!r}", hint(metric, metrics))
        for field, metric in watching(job)
        if metric not in metrics
    ]
    if found:
        raise SpecError(*found)


def period_problems(checkpoint: int, evaluation: int) -> list[Problem]:
    """
    See that each checkpoint has an evaluation of the same step.

    Args:
        checkpoint: steps, or epochs, from one to the next.
        evaluation: the same of evaluations.
    """
    if checkpoint % evaluation == 0:
        return []
    text = f"each checkpoint needs an evaluation: every {checkpoint}, and evaluated every"
    advice = "have checkpoints as often as evaluations, or a multiple"
    return [Problem(("checkpoint", "keep_best"), f"{text} {evaluation}", advice)]
