"""From a rank's gradients to what all ranks decide: the same in both step loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distplat.platform.spec import Job
from distplat.strategies.overlap import rows_come_first
from distplat.strategies.sparse.lookups import Lookups
from distplat.strategies.sparse.row_push import RowPush
from distplat.strategies.training.compute import Share
from distplat.strategies.training.control import NonFiniteSteps, StepControl
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.worker import WorkerStrategy


@dataclass(frozen=True)
class Turn:
    """Which exchange it is."""

    step: int
    """From 0."""
    number: int
    """Of the push to embedding tables."""
    task: int | None = None
    """What it is of, where tasks are leased."""


class StepExchange:
    """
    Exchanges gradients and rows, and decides what becomes of the step.

    Args:
        job: the run.
        flat: what this rank trains.
        strategy: the job's.
        lookups: the model's embedding tables, if it has some.
    """

    def __init__(
        self, job: Job, flat: FlatModel, strategy: WorkerStrategy[Any], lookups: Lookups | None
    ) -> None:
        self._job, self._flat, self._strategy, self._lookups = job, flat, strategy, lookups
        self._steps = NonFiniteSteps.of(job)

    def exchange(self, turn: Turn, rank: int, share: Share) -> StepControl:
        """
        Give the control record of all ranks, decided upon.

        Args:
            turn: which exchange it is.
            rank: this one.
            share: what its part of the step came to.

        Raises:
            NonFiniteError: the run ends here.
        """
        flat, index = self._flat, turn.step if turn.task is None else turn.task
        local = share.record(rank, flat)
        if self._lookups is None:
            total = self._strategy.exchange(index, local)
            return self._steps.decide(total, turn.step, flat.name)
        slots = len(flat.slots)
        rows = RowPush(self._lookups, self._steps, local, weighted=share.weighted, slots=slots)
        rows.before(turn.number, turn.task, waits=turn.task is None and rows_come_first(self._job))
        total = self._strategy.exchange(index, rows.local)
        name = lambda slot: flat.name(slot) if slot < slots else rows.name(slot)  # noqa: E731
        total = self._steps.decide(total, turn.step, name)
        # Before the update, and before a task is told to be done: then the tables have it.
        rows.after(turn.number, total, turn.task)
        return total

    def figures(self) -> dict[str, float]:
        """Give the figures of tables and skipped steps."""
        found = self._steps.figures()
        return found if self._lookups is None else {**found, **self._lookups.figures()}
