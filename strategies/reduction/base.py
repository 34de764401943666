"""What `ring` asks of a way to sum gradients; one file per way beside this one."""

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
    """Say that an option is for gradients of one type."""
    types = sorted({segment.dtype for segment in layout.segments})
    text = f"is for models of one type; the trainable parameters are {' and '.join(types)}"
    return SpecError(Problem(("strategy", option), text, "remove it"))


class Reducer(Protocol):
    """
    Sums `flat.grads` over the group, in every step once.

    It works on the vectors that `flat` had when it was made; a model that moves needs another.
    After an error it is of no more use, as is its group.
    """

    def last_backward(self) -> None:
        """
        Called when the step's last backward begins; skipped on a rank without samples.

        Does nothing, unless gradients are sent while it goes on.
        """
        return

    def finish(self, local: StepControl) -> StepControl:
        """
        Return with the sum over all ranks in `flat.grads`; the local gradients are all there.

        Args:
            local: this rank's control record, without a look at the gradients.

        Returns:
            The sum of all ranks' records. Where it is not finite the gradients may be anything.

        Raises:
            CollectiveError: a rank is missing.
        """

    def figures(self) -> dict[str, float]:
        """
        Give the figures of the step just made, called once per step after its update.

        Names and units are those of docs/metrics.md.
        """

    def close(self) -> None:
        """
        Take the hooks off the model; waits for nothing.

        Either no operation is under way, or the group was given up: then its vectors are too.
        """
        return


_ROUNDS = 3


class Meter:
    """
    Gives the growth of a group's `Traffic` since it was last asked.

    Args:
        collective: the group.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._last = replace(collective.traffic)
        self._is_new = True

    def begin(self) -> None:
        """Called when a step begins: what setting up has cost before the first is no step's."""
        if self._is_new:
            self._is_new = False
            self.lap()

    def lap(self) -> dict[str, float]:
        """Give the figures since the last lap, or since the meter was made."""
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
    Give the seconds of an all-reduce of a whole vector, waiting for late ranks left out.

    Args:
        gradients: shape [n]; set to zero.
        group: every rank calls this.
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
    Tells how much of a step's operations passed behind backward.

        thread      backward ------------------------|finish() ------------| update
        group            [-- op 0 --]    [-- op 1 ---|----][---- op 2 ----]
                         hidden_s =  10  +  9        exposed_s = 20

    Operations of a group run one after another, and a group counts what each took. What they took
    in all, without what passed in `finish`, passed before it: nobody has to be asked when an
    operation ended. Where a group counts more than passed, for it runs several at once, the time
    from the first start to `finish` is the limit.

    Args:
        collective: the group.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._figures = {"exposed_s": 0.0, "hidden_s": 0.0, "hidden_fraction": 0.0}

    def begin(self) -> None:
        """A step's first operation is still to come."""
        self._before = self._busy()
        self._first = 0.0
        self._finish = 0.0

    def start(self) -> None:
        """Another operation is about to be started."""
        self._first = self._first or time.perf_counter()

    def finish(self) -> None:
        """Backward is over: from now on the step waits."""
        self._finish = time.perf_counter()

    def end(self, casting_s: float = 0.0) -> None:
        """
        All operations are over.

        Args:
            casting_s: time since `finish` in which this thread worked and did not wait.
        """
        exposed = max(0.0, time.perf_counter() - self._finish - casting_s)
        behind = max(0.0, self._finish - self._first) if self._first else 0.0
        hidden = min(behind, max(0.0, self._busy() - self._before - exposed))
        fraction = hidden / (hidden + exposed) if hidden else 0.0
        self._figures = {"exposed_s": exposed, "hidden_s": hidden, "hidden_fraction": fraction}

    def figures(self) -> dict[str, float]:
        """Give the figures of the step that ended last."""
        return dict(self._figures)

    def _busy(self) -> float:
        traffic = self._collective.traffic
        return traffic.waiting_s + traffic.working_s


class ControlSum:
    """
    Sums the ranks' control records.

    Args:
        group: all ranks; each makes this at the same time.
        slots: of the flat vector.
        device: where the group's tensors lie.
    """

    def __init__(self, group: Collective, slots: int, device: torch.device) -> None:
        self._alone = group.world == 1
        self._group = group
        like = torch.empty(control_size(slots), dtype=torch.float64, device=device)
        self._vector = like if self._alone else group.share(like)
        self._local = StepControl()
        self._handle: Handle | None = None

    def start(self, local: StepControl) -> None:
        """Begin to sum; the next operations of the group may be begun, too."""
        self._local = local
        if self._alone:
            return
        self._vector.copy_(torch.from_numpy(local.pack()))
        self._handle = self._group.start_all_reduce(self._vector)

    def wait(self) -> StepControl:
        """
        Give the sum, the same on every rank but for the rank and parameter that it names.

        Raises:
            CollectiveError: a rank is missing.
        """
        if self._handle is None:
            return self._local
        self._handle.wait()
        self._handle = None
        return StepControl.unpack(self._vector.cpu().numpy().copy()).named(self._local)
