"""
Learning rates that go by evaluations: torch's `ReduceLROnPlateau`, over attempts and processes.

    each rank    evaluation after step 40 ── the figures of all ranks ──▶ the same state everywhere
    step 40      a rank's own optimizer: the rate from its state
                 servers: the state comes with the push, and is kept until the next one

The state is a handful of numbers, and the rate a function of one of them: how many times it was
reduced. A checkpoint has it. Workers that are left have it, and servers where none is left. It says
which evaluation was the last that it has seen, so one that is made again counts once.

The classes read no clock and talk to nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from distplat.platform.errors import Problem, SpecError, hint
from distplat.platform.lr_schedules import ReduceLROnPlateau

PLATEAU = "plateau"
"""Fact of a checkpoint: see `Plateau.saved`."""


class PlateauState(NamedTuple):
    """The scheduler's state after an evaluation."""

    at: int
    """Steps before the last one that is in it; 0: there was none."""
    reductions: int
    """How many times the rate was reduced."""
    best: float
    """Best figure so far."""
    bad: int = 0
    """Evaluations since it, or since the last reduction."""
    cooldown: int = 0
    """Evaluations that do not count any more as bad ones."""

    @classmethod
    def of(cls, numbers: Iterable[float]) -> PlateauState:
        """Read what `tuple` gives of one, as floats."""
        at, reductions, best, bad, cooldown = numbers
        return cls(int(at), int(reductions), best, int(bad), int(cooldown))


def first_state(rule: ReduceLROnPlateau) -> PlateauState:
    """Give the state before any evaluation."""
    return PlateauState(0, 0, math.inf if rule.mode == "min" else -math.inf)


def after_evaluation(
    rule: ReduceLROnPlateau, state: PlateauState, step: int, figure: float
) -> PlateauState:
    """
    Give the state after one more evaluation; the same if that is in it, or of the warm-up.

    Args:
        rule: of the job.
        state: before.
        step: steps that the evaluated parameters have behind them.
        figure: what it gave.
    """
    if step <= max(state.at, rule.warmup_steps):
        return state
    _, reductions, best, bad, cooldown = state
    better = rule.better(figure, best)
    best, bad = (figure, 0) if better else (best, bad + 1)
    if cooldown > 0:
        cooldown, bad = cooldown - 1, 0
    if bad > rule.patience:
        reductions, cooldown, bad = reductions + 1, rule.cooldown, 0
    return PlateauState(step, reductions, best, bad, cooldown)


class Plateau:
    """
    The rates of one process; it has this in place of the job's schedule, through all attempts.

    Args:
        rule: of the job.
    """

    def __init__(self, rule: ReduceLROnPlateau) -> None:
        self.rule = rule
        self.known: PlateauState | None = None
        """None: this process has not been told yet."""

    @property
    def state(self) -> PlateauState:
        """The scheduler's state after an evaluation."""
        assert self.known is not None, "sync(), load() or an assignment comes first"
        return self.known

    def rate(self, base: float, step: int, total_steps: int) -> float:
        """Give the learning rate of the step under way; see `LRSchedule.rate`."""
        return self.rule.rate(self.rule.reduced(base, self.state.reductions), step, total_steps)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """
        Take an evaluation; every rank is given the same bits.

        Args:
            step: steps that the evaluated parameters have behind them.
            metrics: of all ranks together.

        Raises:
            SpecError: it does not give the figure.
        """
        name = self.rule.metric
        if name not in metrics:
            text = f"the evaluation gives no {name!r}"
            raise SpecError(Problem(("lr_schedule", "metric"), text, hint(name, metrics)))
        self.known = after_evaluation(self.rule, self.state, step, metrics[name])

    def sync(self, version: int, known: Iterable[PlateauState]) -> bool:
        """
        Take the newest known state of a version when an attempt begins; False: there is none.

        Args:
            version: with which it begins.
            known: what ranks and servers have.
        """
        usable = [state for state in known if state.at <= version]
        if not version:
            usable = [first_state(self.rule)]
        self.known = max(usable, key=lambda state: state.at, default=None)
        return self.known is not None

    def saved(self) -> dict[str, Any]:
        """Give what a checkpoint needs; JSON has no infinity, so the best figure is text."""
        state = self.state._replace(best=0.0)
        best, rule = repr(self.state.best), self.rule
        return {"metric": rule.metric, "mode": rule.mode, "best": best, "state": [*state]}

    def load(self, saved: Mapping[str, Any] | None) -> None:
        """
        Begin from a checkpoint.

        Args:
            saved: what `saved` gave; of another figure it says only how low the rate is. None: the
                run had another schedule.
        """
        self.known = first_state(self.rule)
        if saved is None:
            return
        had = PlateauState.of(saved["state"])
        if (saved["metric"], saved["mode"]) == (self.rule.metric, self.rule.mode):
            self.known = had._replace(best=float(saved["best"]))
        else:
            self.known = self.known._replace(reductions=had.reductions)
