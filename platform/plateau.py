"""
Learning rates based on evaluations: torch's `ReduceLROnPlateau`, across attempts and processes.

    each rank    evaluation after step 40 ── metrics of all ranks ──▶ the same state everywhere
    step 40      a rank's own optimizer: the rate from its state
                 servers: the state comes with the push, and is kept until the next one

The state is a few numbers, and the rate a function of one of them: the number of reductions. The
state is saved in checkpoints; after a failure it is restored from surviving workers, or from
servers if no worker survived. It contains the step of the last evaluation, so a repeated evaluation
counts once.

The classes read no clock and do no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from distplat.platform.errors import Problem, SpecError, hint
from distplat.platform.lr_schedules import ReduceLROnPlateau

PLATEAU = "plateau"
"""Key of the state in a checkpoint: see `Plateau.state_dict`."""


class PlateauState(NamedTuple):
    """State of the scheduler after an evaluation."""

    at: int
    """Steps before the last evaluation; 0: none."""
    reductions: int
    """Number of reductions of the rate."""
    best: float
    """Best value so far."""
    bad: int = 0
    """Evaluations since the best value, or since the last reduction."""
    cooldown: int = 0
    """Evaluations to come that do not count as bad."""

    @classmethod
    def of(cls, numbers: Iterable[float]) -> PlateauState:
        """Build the state from a sequence of floats, as `tuple(state)` gives it."""
        at, reductions, best, bad, cooldown = numbers
        return cls(int(at), int(reductions), best, int(bad), int(cooldown))


def first_state(rule: ReduceLROnPlateau) -> PlateauState:
    """Return the state before any evaluation."""
    return PlateauState(0, 0, math.inf if rule.mode == "min" else -math.inf)


def after_evaluation(
    rule: ReduceLROnPlateau, state: PlateauState, step: int, figure: float
) -> PlateauState:
    """
    Return the state after an evaluation; unchanged if it is a repeat or within the warm-up.

    Args:
        rule: the job's rule.
        state: before the evaluation.
        step: steps done before the evaluation.
        figure: value of the metric.
    """
    if step <= max(state.at, rule.warmup_steps):
        return state
    _, reductions, best, bad, cooldown = state
    better = rule.is_better(figure, best)
    best, bad = (figure, 0) if better else (best, bad + 1)
    if cooldown > 0:
        cooldown, bad = cooldown - 1, 0
    if bad > rule.patience:
        reductions, cooldown, bad = reductions + 1, rule.cooldown, 0
    return PlateauState(step, reductions, best, bad, cooldown)


class Plateau:
    """
    Learning rates of one process, in place of the job's schedule, through all attempts.

    Args:
        rule: the job's rule.
    """

    def __init__(self, rule: ReduceLROnPlateau) -> None:
        self.rule = rule
        self.known: PlateauState | None = None
        """None: unknown until `sync` or `load_state_dict`."""

    @property
    def state(self) -> PlateauState:
        """State after the last evaluation."""
        assert self.known is not None, "call sync() or load_state_dict(), or assign `known` first"
        return self.known

    def rate(self, base: float, step: int, total_steps: int) -> float:
        """Return the learning rate of the present step; see `LRSchedule.rate`."""
        return self.rule.rate(self.rule.reduced(base, self.state.reductions), step, total_steps)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """
        Update the state after an evaluation; all ranks pass the same bits.

        Args:
            step: steps done before the evaluation.
            metrics: of all ranks together.

        Raises:
            SpecError: the metric is missing.
        """
        name = self.rule.metric
        if name not in metrics:
            text = f"the evaluation gives no {name!r}"
            raise SpecError(Problem(("lr_schedule", "metric"), text, hint(name, metrics)))
        self.known = after_evaluation(self.rule, self.state, step, metrics[name])

    def sync(self, version: int, known: Iterable[PlateauState]) -> bool:
        """
        Adopt the newest state of a version at the start of an attempt; False: there is none.

        Args:
            version: with which the attempt starts.
            known: states of ranks and servers.
        """
        usable = [state for state in known if state.at <= version]
        if not version:
            usable = [first_state(self.rule)]
        self.known = max(usable, key=lambda state: state.at, default=None)
        return self.known is not None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, with the best value as text: JSON has no infinity."""
        state = self.state._replace(best=0.0)
        best, rule = repr(self.state.best), self.rule
        return {"metric": rule.metric, "mode": rule.mode, "best": best, "state": [*state]}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """
        Restore the state from a checkpoint.

        Args:
            saved: result of `state_dict`; with another metric, only the number of reductions is
                used. None: the run had another schedule.
        """
        self.known = first_state(self.rule)
        if saved is None:
            return
        saved_state = PlateauState.of(saved["state"])
        if (saved["metric"], saved["mode"]) == (self.rule.metric, self.rule.mode):
            self.known = saved_state._replace(best=float(saved["best"]))
        else:
            self.known = self.known._replace(reductions=saved_state.reductions)
