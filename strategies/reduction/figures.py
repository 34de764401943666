"""Figures of a step's exchange, as docs/metrics.md defines them."""

import statistics
import time
from dataclasses import replace

from torch import Tensor

from distplat.strategies.collective import Collective

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
