"""
What lossy ways to sum gradients have in common: error feedback and an account of whether it pays.

Error feedback (Seide et al. 2014; Stich et al. 2018; Karimireddy et al. 2019): what a rank could
not send it keeps, and adds to what it means to send in the next step.

    meant    = residual + gradient                 all of it this rank's own
    sent     = compress(meant)
    residual = meant - sent                        so: all sent so far + residual = all gradients
    result   = sum of `sent` over the ranks

Gradients are terms of a sum, already weighted by the rank's share of the batch, and so is what is
sent: nothing is divided by the number of ranks.

The residual lives in ordinary memory and changes only when an exchange has ended: one that failed
leaves it as it was, so that the step can be repeated (`inherit`).
"""

import time
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from distplat.strategies.algorithms.reduce import squared_norm
from distplat.strategies.algorithms.ring import traffic_elements
from distplat.strategies.collective import Collective
from distplat.strategies.reduction.base import Reducer, several_types
from distplat.strategies.reduction.control_sum import ControlSum
from distplat.strategies.reduction.figures import Meter, time_all_reduce
from distplat.strategies.training.control import StepControl
from distplat.strategies.training.flat import FlatModel


class CompressedReducer(Reducer):
    """
    A `Reducer` that sends less than the gradients, all at once when they are there.

    Takes two more vectors of the gradients' size. Alone in its group it does nothing at all.

    Args:
        flat: its gradients are set to zero: an all-reduce of them is timed here, as a baseline.
        collective: the group; every rank makes its reducer at the same time.
        look: look for NaN and infinity in the gradients before they are exchanged.

    Raises:
        SpecError: the parameters are of several types.
    """

    def __init__(self, flat: FlatModel, collective: Collective, *, look: bool = True) -> None:
        if flat.mixed:
            raise several_types(flat)
        self._flat, self._collective, self._look = flat, collective, look
        self._control = ControlSum(collective, len(flat.slots), flat.grads.device)
        self._grads = flat.grads[: flat.layout.tail]
        self.residual = torch.zeros_like(self._grads)
        """What this rank has not sent yet: shape [n]."""
        self._meant = torch.zeros_like(self._grads)
        self._alone = collective.world == 1
        sent, _ = traffic_elements(self._grads.numel(), collective.rank, collective.world)
        self._plain_bytes = sent * flat.grads.itemsize
        self._travel_s = 0.0
        self._baseline_s = 0.0 if self._alone else time_all_reduce(self._grads, collective)
        self._step, self._sending = Meter(collective), Meter(collective)
        self._figures: dict[str, float] = {}

    @abstractmethod
    def _send(self, meant: Tensor) -> float:
        """
        Write the sum over ranks of what is sent into `flat.grads`; take this rank's out of `meant`.

        Args:
            meant: shape [n]; left is what was not sent.

        Returns:
            The squared 2-norm of what this rank sent.
        """

    def last_backward(self) -> None:
        """See `Reducer`. What is to be sent is known only when all gradients are there."""

    def finish(self, local: StepControl) -> StepControl:
        """
        See `Reducer`.

        The control record goes first: of a step that is not finite nothing is sent, so residuals
        stay as they are.
        """
        local = local.looked_at(self._flat) if self._look else local
        if self._alone:
            return local
        if not self._figures:
            self._step.lap()  # what setting up has cost is no step's
        self._control.start(local)
        total = self._control.wait()
        if self._look and not total.finite:
            return total
        self._sending.lap()
        self._travel_s, began = 0.0, time.perf_counter()
        error_norm = self._exchange()
        seconds = time.perf_counter() - began
        lap = self._sending.lap()
        self._figures = {
            "exposed_s": self._travel_s,
            "saved_bytes": self._plain_bytes - lap["sent_bytes"],
            "compress_s": seconds - self._travel_s,
            "baseline_s": self._baseline_s,
            "saved_s": self._baseline_s - (seconds - lap["waiting_s"]),
            "error_norm": error_norm,
        }
        return total

    def figures(self) -> dict[str, float]:
        """See `Reducer`."""
        return {**self._step.lap(), **self._figures}

    def close(self) -> None:
        """See `Reducer`. There are no hooks."""

    def inherit(self, old: "CompressedReducer") -> None:
        """
        Go on with the residual of a reducer of the same model that an earlier group had.

        Ranks need not all do so: a new worker has none.
        """
        self.residual.copy_(old.residual)

    def _exchange(self) -> float:
        """Exchange with error feedback; give |not sent| / |meant|, 2-norms."""
        torch.add(self.residual, self._grads, out=self._meant)
        sent = self._send(self._meant)
        self.residual, self._meant = self._meant, self.residual
        left = squared_norm(self.residual)
        # Both schemes send a part that is orthogonal to the rest, so the squares add up.
        return float((left / (left + sent)) ** 0.5) if left else 0.0

    def _all_reduce(self, tensor: Tensor) -> None:
        """Sum over the group, on the clock."""
        began = time.perf_counter()
        self._collective.all_reduce(tensor)
        self._travel_s += time.perf_counter() - began

    def _all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """Collect from the group, on the clock."""
        began = time.perf_counter()
        self._collective.all_gather(outputs, tensor)
        self._travel_s += time.perf_counter() - began
