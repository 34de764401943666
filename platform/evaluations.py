"""
What a run makes of its evaluations: which checkpoint is the best, and whether to stop early.

The learning rate may go by them, too (`plateau.py`). The classes read no clock, no disk and talk to
nobody.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field

from distplat.platform.errors import Problem, SpecError, StorageError, hint
from distplat.platform.fields import Count, Spec
from distplat.platform.lr_schedules import ReduceLROnPlateau

EARLY_STOP = "early_stop"
"""What a checkpoint says of the evaluations before it, see `EarlyStopping.saved`."""
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
        """Step of the best checkpoint, of equals the first; None: none was evaluated."""
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


class _Stagnation(NamedTuple):
    """The state of early stopping after an evaluation."""

    at: int = -1
    """Step of the last one that is in it; -1: there was none."""
    best: float | None = None
    """Best figure so far; None: there is none but NaN."""
    best_step: int = 0
    worse: int = 0
    """Evaluations since the best one."""


def _parse_state(saved: Mapping[str, Any]) -> _Stagnation:
    try:
        at, best_step, worse = map(int, saved["state"])
        best = None if saved["best"] is None else float(saved["best"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise StorageError(f"what the checkpoint says of {EARLY_STOP} is damaged") from None
    return _Stagnation(at, best, best_step, worse)


class EarlyStopping:
    """
    Whether evaluations still get better, also since before a run was resumed.

    Args:
        rule: of the job.
        saved: what the checkpoint has of `saved`; None: nothing, or the run begins.

    Raises:
        StorageError: that is damaged.
    """

    def __init__(self, rule: EarlyStop, saved: Mapping[str, Any] | None = None) -> None:
        self._rule, self._state = rule, _Stagnation()
        if saved is not None and (saved.get("metric"), saved.get("mode")) == (
            rule.metric,
            rule.mode,
        ):
            self._state = _parse_state(saved)
        self._resumed_at = self._state.at  #: evaluations up to this step were before
        self._states = {self._state.at: self._state}  #: by step, in the order in which they came

    @property
    def metric(self) -> str:
        """Figure that it goes by."""
        return self._rule.metric

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Take an evaluation; give why the run is to end, or None."""
        if step <= self._resumed_at:
            return None  # it is made again
        (at, best, best_step, worse), rule = self._state, self._rule
        better = rule.better(figure := metrics[rule.metric], best, rule.min_delta)
        after = (figure, step, 0) if better else (best, best_step, worse + 1)
        self._state = _Stagnation(max(at, step), *after)
        self._states[step] = self._state
        if len(self._states) > _KEPT:
            del self._states[next(iter(self._states))]
        if better or self._state.worse < rule.patience:
            return None
        since = f"since step {best_step}" if best is not None else "at all"
        return f"{rule.metric} got no better {since}, in {self._state.worse} evaluations"

    def saved(self, step: int, every: int) -> dict[str, Any]:
        """
        Give what a checkpoint needs; JSON has no infinity, so the best figure is text.

        Args:
            step: of the checkpoint; evaluations after it are made again.
            every: steps from one evaluation to the next; one at the end alone is not there in a
                longer run, which this may become.
        """
        known = [(at, one) for at, one in self._states.items() if at <= step]
        repeated = [one for at, one in known if at == self._resumed_at or at % max(1, every) == 0]
        *_, last = (_Stagnation(), *repeated)
        best = None if last.best is None else repr(last.best)
        state = [last.at, last.best_step, last.worse]
        return {"metric": self._rule.metric, "mode": self._rule.mode, "best": best, "state": state}


def watching(job: Any) -> list[tuple[tuple[str, ...], str]]:
    """Give what a job decides by evaluations: the fields, and the figure that each goes by."""
    schedule = job.lr_schedule
    rules: list[tuple[tuple[str, ...], MetricRule | ReduceLROnPlateau | None]] = [
        (("checkpoint", "keep_best"), job.checkpoint.keep_best),
        (("early_stop",), job.early_stop),
        (("lr_schedule",), schedule if isinstance(schedule, ReduceLROnPlateau) else None),
    ]
    return [(field, rule.metric) for field, rule in rules if rule is not None]


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
    problems = [
        Problem((*field, "metric"), f"the evaluation gives no {metric!r}", hint(metric, metrics))
        for field, metric in watching(job)
        if metric not in metrics
    ]
    if problems:
        raise SpecError(*problems)


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
