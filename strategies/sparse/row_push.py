"""
When the rows of a step leave: before its gradients, or once all ranks' control records are known.

    plain mean, `non_finite: stop`     rows first: their way is hidden behind the exchange
    weighted loss, `skip`              rows last: what they are scaled by, or whether they count at
                                       all, is known then
    asynchronous tables                rows first, and waited for; this rank's record decides alone
"""

from __future__ import annotations

from dataclasses import replace

from distplat.strategies.ports import Sending
from distplat.strategies.sparse.lookups import Lookups
from distplat.strategies.training.control import NonFiniteSteps, StepControl


class RowPush:
    """
    One step's push of rows.

    Args:
        lookups: the model's embedding tables.
        steps: what becomes of steps that are not finite.
        local: this rank's control record.
        weighted: whether loss() gave weights.
        slots: of the flat vector.
    """

    def __init__(
        self,
        lookups: Lookups,
        steps: NonFiniteSteps,
        local: StepControl,
        *,
        weighted: bool,
        slots: int,
    ) -> None:
        self._lookups, self._skips, self._weighted = lookups, steps.skips, weighted
        self._slots = slots
        self._row = lookups.first_non_finite() if steps.looks else None
        self.local = local if self._row is None else replace(local, non_finite=1, slot=slots)
        """The record, with what was found in the rows."""
        self._sent: Sending | None = None
        self._pushed = False

    def before(self, number: int, task: int | None = None, *, waits: bool = False) -> None:
        """
        Have the rows leave, if they may before the gradients do.

        Args:
            number: of the push.
            task: what it is of, where tasks are leased.
            waits: the tables are asynchronous, and must have the rows before the gradients leave.
        """
        if waits:
            skip = self._skips and not self.local.finite
            self._push(number, task, skip=skip, scale=self.local.scale)
            self.wait()
        elif not self._skips and not self._weighted:
            self._push(number, task, skip=False, scale=1.0)

    def after(self, number: int, total: StepControl, task: int | None = None) -> None:
        """Have the rows leave now, unless they have; return when all servers have the step."""
        if not self._pushed:
            self._push(number, task, skip=total.skip, scale=total.scale)
        self.wait()

    def name(self, place: int) -> str:
        """Name what `StepControl.slot` counts behind the parameters."""
        assert place == self._slots, "rows are the only thing behind the parameters"
        return self._row or "rows of an embedding table"

    def wait(self) -> None:
        """Return when all servers have what was pushed."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None

    def _push(self, number: int, task: int | None, *, skip: bool, scale: float) -> None:
        self._pushed = True
        self._sent = self._lookups.push(number, task, skip=skip, scale=scale)
