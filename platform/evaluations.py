"""
Decisions based on evaluations: the best checkpoint and early stopping.

`plateau.py` has learning rates based on evaluations. The classes read no clock and do no I/O.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field

from distplat.platform.errors import Problem, SpecError, StorageError, hint
from distplat.platform.fields import Count, Spec
from distplat.platform.lr_schedules import ReduceLROnPlateau

EARLY_STOP = "early_stop"
"""Key of early stopping's state in a checkpoint, see `EarlyStopping.state_dict`."""
_MAX_KEPT = 1000
"""Most evaluations whose metric is kept."""


class MetricRule(Spec):
    """A metric of evaluations, and the direction of improvement."""

    metric: str = Field(min_length=1)
    """Metric of an evaluation: `loss`, or a name that the task's metrics() returns; of a train
    function, a metric of its reports."""
    mode: Literal["min", "max"]
    """Whether a smaller or a larger value is better."""

    def is_better(self, figure: float, than: float | None, by: float = 0.0) -> bool:
        """
        Return whether a value is better than another by more than `by`; NaN is never better.

        Args:
            figure: the new value.
            than: the best value so far; None: none.
            by: at least 0.
        """
        if math.isnan(figure):
            return False
        if than is None:
            return True
        return figure < than - by if self.mode == "min" else figure > than + by


class KeepBest(MetricRule):
    """Which checkpoint is kept beside the newest ones."""


class EarlyStop(MetricRule):
    """When a run ends before its last step because evaluations do not improve."""

    patience: Count = 3
    """Consecutive evaluations without improvement after which the run ends."""
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Smallest difference that counts as an improvement."""


class BestCheckpoint:
    """
    Finds the best of a run's checkpoints, among steps with an evaluation.

    Args:
        rule: the job's rule; None: disabled.
    """

    def __init__(self, rule: KeepBest | None) -> None:
        self._rule = rule
        self._figures: dict[int, float] = {}  #: step -> value of the metric, oldest first
        self._saved: set[int] = set()  #: steps with a checkpoint
        self._evaluated = 0  #: step of the newest evaluation

    @property
    def step(self) -> int | None:
        """Step of the best checkpoint, the first of equals; None: no checkpoint was evaluated."""
        best: int | None = None
        for step in sorted(self._saved & self._figures.keys()):
            assert self._rule is not None, "no values are recorded without a rule"
            figure = self._figures[step]
            if self._rule.is_better(figure, None if best is None else self._figures[best]):
                best = step
        return best

    @property
    def figure(self) -> float:
        """Value of the best checkpoint's metric."""
        step = self.step
        return math.nan if step is None else self._figures[step]

    @property
    def protected(self) -> set[int]:
        """Steps whose checkpoints are kept: the best, and those not evaluated yet."""
        best = self.step
        late = {step for step in self._saved if step > self._evaluated}
        return late if best is None else {*late, best}

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record an evaluation."""
        if self._rule is None or self._rule.metric not in metrics:
            return
        self._figures[step] = metrics[self._rule.metric]
        self._evaluated = max(self._evaluated, step)
        best = self.step
        while len(self._figures) > _MAX_KEPT:
            del self._figures[next(known for known in self._figures if known != best)]

    def saved(self, step: int) -> None:
        """Record that a checkpoint was written."""
        if self._rule is not None:
            self._saved.add(step)

    def retain(self, steps: Iterable[int]) -> None:
        """Record which checkpoints remain on disk."""
        self._saved &= set(steps)


class _Stagnation(NamedTuple):
    """State of early stopping after an evaluation."""

    at: int = -1
    """Step of the last evaluation; -1: none."""
    best: float | None = None
    """Best value so far; None: none, or only NaN."""
    best_step: int = 0
    bad: int = 0
    """Evaluations since the best one."""


def _parse_state(saved: Mapping[str, Any]) -> _Stagnation:
    try:
        at, best_step, bad = map(int, saved["state"])
        best = None if saved["best"] is None else float(saved["best"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise StorageError(f"what the checkpoint says of {EARLY_STOP} is damaged") from None
    return _Stagnation(at, best, best_step, bad)


class EarlyStopping:
    """
    Tracks whether evaluations still improve, also across a resume.

    Args:
        rule: the job's rule.
        saved: result of `state_dict` from the checkpoint; None: none.

    Raises:
        StorageError: `saved` is damaged.
    """

    def __init__(self, rule: EarlyStop, saved: Mapping[str, Any] | None = None) -> None:
        self._rule, self._state = rule, _Stagnation()
        if saved is not None and (saved.get("metric"), saved.get("mode")) == (
            rule.metric,
            rule.mode,
        ):
            self._state = _parse_state(saved)
        self._resumed_at = self._state.at  #: evaluations up to this step are repeats
        self._states = {self._state.at: self._state}  #: by step, in order

    @property
    def metric(self) -> str:
        """Metric of the rule."""
        return self._rule.metric

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Record an evaluation; return the reason to stop, or None."""
        if step <= self._resumed_at:
            return None  # a repeat
        (at, best, best_step, bad), rule = self._state, self._rule
        is_better = rule.is_better(figure := metrics[rule.metric], best, rule.min_delta)
        after = (figure, step, 0) if is_better else (best, best_step, bad + 1)
        self._state = _Stagnation(max(at, step), *after)
        self._states[step] = self._state
        if len(self._states) > _MAX_KEPT:
            del self._states[next(iter(self._states))]
        if is_better or self._state.bad < rule.patience:
            return None
        since = f"since step {best_step}" if best is not None else "at all"
        return f"{rule.metric} got no better {since}, in {self._state.bad} evaluations"

    def state_dict(self, step: int, every: int) -> dict[str, Any]:
        """
        Return the state for a checkpoint; the best value is text, because JSON has no infinity.

        Args:
            step: of the checkpoint; later evaluations will be repeated.
            every: steps between evaluations. An evaluation at the end of the run is not part of the
                state, because a longer resumed run does not repeat it.
        """
        last = _Stagnation()
        for at, state in self._states.items():
            if at <= step and (at == self._resumed_at or at % max(1, every) == 0):
                last = state
        best = None if last.best is None else repr(last.best)
        numbers = [last.at, last.best_step, last.bad]
        return {
            "metric": self._rule.metric,
            "mode": self._rule.mode,
            "best": best,
            "state": numbers,
        }


def metric_fields(job: Any) -> list[tuple[tuple[str, ...], str]]:
    """Return the fields of a job that depend on evaluations, each with its metric."""
    schedule = job.lr_schedule
    rules: list[tuple[tuple[str, ...], MetricRule | ReduceLROnPlateau | None]] = [
        (("checkpoint", "keep_best"), job.checkpoint.keep_best),
        (("early_stop",), job.early_stop),
        (("lr_schedule",), schedule if isinstance(schedule, ReduceLROnPlateau) else None),
    ]
    return [(field, rule.metric) for field, rule in rules if rule is not None]


def evaluation_problems(job: Any) -> list[Problem]:
    """Check the fields that depend on evaluations, as far as possible without running one."""
    evaluation = job.evaluation
    if evaluation.every_steps is None and evaluation.every_epochs == 0:
        text = "needs evaluations during the run, but the only one is at its end"
        advice = "set `evaluation.every_epochs`"
        return [Problem(field, text, advice) for field, _ in metric_fields(job)]
    return _keep_best_problems(job)


def _keep_best_problems(job: Any) -> list[Problem]:
    chosen, evaluation = job.checkpoint, job.evaluation
    if chosen.keep_best is None:
        return []
    if not chosen.enabled:
        text = "has no effect without `every_steps` or `every_epochs`"
        return [Problem(("checkpoint", "keep_best"), text, "give one of them")]
    if chosen.every_steps is not None and evaluation.every_steps is not None:
        return period_problems(chosen.every_steps, evaluation.every_steps)
    if chosen.every_epochs is not None and evaluation.every_steps is None:
        return period_problems(chosen.every_epochs, evaluation.every_epochs)
    return []


def check_metrics(job: Any, metrics: Mapping[str, float]) -> None:
    """
    Check that an evaluation returns every metric that the job needs.

    Args:
        job: the run's.
        metrics: of an evaluation.

    Raises:
        SpecError: a metric is missing.
    """
    problems = [
        Problem((*field, "metric"), f"the evaluation gives no {metric!r}", hint(metric, metrics))
        for field, metric in metric_fields(job)
        if metric not in metrics
    ]
    if problems:
        raise SpecError(*problems)


def period_problems(checkpoint: int, evaluation: int) -> list[Problem]:
    """
    Check that each checkpoint has an evaluation of the same step.

    Args:
        checkpoint: steps, or epochs, between checkpoints.
        evaluation: steps, or epochs, between evaluations.
    """
    if checkpoint % evaluation == 0:
        return []
    text = f"each checkpoint needs an evaluation: every {checkpoint}, and evaluated every"
    advice = "have checkpoints as often as evaluations, or a multiple"
    return [Problem(("checkpoint", "keep_best"), f"{text} {evaluation}", advice)]
