"""The protocol of `ring`'s gradient reducers, and meters of their traffic and overlap."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from distplat.platform.errors import Problem, SpecError
from distplat.platform.vector_layout import Layout
from distplat.strategies.collective import Collective, Handle
from distplat.strategies.loop.control import StepControl, control_size


def mixed_dtypes_error(layout: Layout, option: str = "compression") -> SpecError:
    """Return the error for an option that needs gradients of a single dtype."""
    dtypes = sorted({segment.dtype for segment in layout.segments})
    text = f"needs a single dtype; the trainable parameters are {' and '.join(dtypes)}"
    return SpecError(Problem(("strategy", option), text, "remove it"))


class Reducer(Protocol):
    """
    Sums `flat.grads` over the group, once per step.

    A reducer works on the vectors that `flat` has at construction; after `flat.move` a new reducer
    is needed. After an error neither the reducer nor its group can be used again.
    """

    def last_backward(self) -> None:
        """
        Called before the step's last backward; not called on a rank without samples.

        Does nothing, unless gradients are sent during backward.
        """
        return

    def finish(self, local: StepControl) -> StepControl:
        """
        Sum the gradients of all ranks into `flat.grads`; called after backward.

        Args:
            local: this rank's control record, before the check for NaN and infinity.

        Returns:
            The sum of all ranks' records. If it is not finite, `flat.grads` is undefined.

        Raises:
            CollectiveError: a rank is missing.
        """

    def figures(self) -> dict[str, float]:
        """
        Return the figures of the last step; called once per step, after the update.

        Names and units as in docs/metrics.md.
        """

    def close(self) -> None:
        """
        Remove the hooks from the model, without waiting.

        Either no operation is in flight, or the group was aborted and its vectors are discarded.
        """
        return


_ROUNDS = 3


class Meter:
    """
    Measures the growth of a group's `Traffic` between laps.

    Args:
        collective: the group.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._last = replace(collective.traffic)
        self._is_new = True

    def begin(self) -> None:
        """Called when a step starts; discards the traffic of setup before the first step."""
        if self._is_new:
            self._is_new = False
            self.lap()

    def lap(self) -> dict[str, float]:
        """Return the figures since the last lap, or since construction."""
        now, last = self._collective.traffic, self._last
        self._last = replace(now)
        return {
            "sent_bytes": float(now.sent_bytes - last.sent_bytes),
            "received_bytes": float(now.received_bytes - last.received_bytes),
            "waiting_s": now.waiting_s - last.waiting_s,
            "working_s": now.working_s - last.working_s,
        }


def time_all_reduce(gradients: Tensor, group: Collective) -> float:
    """
    Return the median seconds of an all-reduce of a vector, without waiting for late ranks.

    Args:
        gradients: shape [n]; set to zero.
        group: every rank calls this function.
    """
    gradients.zero_()
    group.barrier()
    rounds = []
    for _ in range(_ROUNDS):
        began, waited = time.perf_counter(), group.traffic.waiting_s
        group.all_reduce(gradients)
        rounds.append(time.perf_counter() - began - (group.traffic.waiting_s - waited))
    return statistics.median(rounds)


class OverlapMeter:
    """
    Measures how much of a step's communication is hidden behind backward.

        thread      backward ------------------------|finish() ------------| update
        group            [-- op 0 --]    [-- op 1 ---|----][---- op 2 ----]
                         hidden_s =  10  +  9        exposed_s = 20

    Operations of a group run one after another, and the group counts their total time. Total time
    minus the time spent in `finish` was hidden, so no completion times are needed. A group that
    runs several operations at once counts more than the elapsed time; hidden time is therefore
    limited to the time from the first start to `finish`.

    Args:
        collective: the group.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._figures = {"exposed_s": 0.0, "hidden_s": 0.0, "hidden_fraction": 0.0}

    def begin(self) -> None:
        """Called before a step's first operation."""
        self._before = self._busy()
        self._first = 0.0
        self._finish = 0.0

    def start(self) -> None:
        """Called before each operation is started."""
        self._first = self._first or time.perf_counter()

    def finish(self) -> None:
        """Called after backward: from here on communication is exposed."""
        self._finish = time.perf_counter()

    def end(self, casting_s: float = 0.0) -> None:
        """
        Called when all operations are complete.

        Args:
            casting_s: time since `finish` that this thread spent casting instead of waiting.
        """
        exposed = max(0.0, time.perf_counter() - self._finish - casting_s)
        behind = max(0.0, self._finish - self._first) if self._first else 0.0
        hidden = min(behind, max(0.0, self._busy() - self._before - exposed))
        fraction = hidden / (hidden + exposed) if hidden else 0.0
        self._figures = {"exposed_s": exposed, "hidden_s": hidden, "hidden_fraction": fraction}

    def figures(self) -> dict[str, float]:
        """Return the figures of the last step."""
        return dict(self._figures)

    def _busy(self) -> float:
        traffic = self._collective.traffic
        return traffic.waiting_s + traffic.working_s


class ControlSum:
    """
    Sums the ranks' control records.

    Args:
        group: all ranks; construction is a collective operation.
        slots: number of slots of the flat vector.
        device: of the group's tensors.
    """

    def __init__(self, group: Collective, slots: int, device: torch.device) -> None:
        self._alone = group.world == 1
        self._group = group
        like = torch.empty(control_size(slots), dtype=torch.float64, device=device)
        self._vector = like if self._alone else group.share(like)
        self._local = StepControl()
        self._handle: Handle | None = None

    def start(self, local: StepControl) -> None:
        """Start the sum; further operations of the group may be started before `wait`."""
        self._local = local
        if self._alone:
            return
        self._vector.copy_(torch.from_numpy(local.pack()))
        self._handle = self._group.start_all_reduce(self._vector)

    def wait(self) -> StepControl:
        """
        Return the sum, equal on all ranks except for the rank and parameter that it names.

        Raises:
            CollectiveError: a rank is missing.
        """
        if self._handle is None:
            return self._local
        self._handle.wait()
        self._handle = None
        return StepControl.unpack(self._vector.cpu().numpy().copy()).named(self._local)
