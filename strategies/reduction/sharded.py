"""
ZeRO stage 1: each rank holds the optimizer state of one part (Rajbhandari et al., SC 2020).

    gradients   [ part 0 | part 1 | part 2 ]      each rank's local gradients
                     | reduce-scatter
    rank 1                [ part 1 ]              summed
                     | clip by the norm over all parts, update with state of this part alone
    rank 1                [ part 1 ]              new parameters
                     | all-gather
    parameters  [ part 0 | part 1 | part 2 ]      the same on all ranks

Reduce-scatter plus all-gather send as much as one all-reduce; memory for optimizer state falls to
1/N. Most optimizers act element by element, so a part gets the same update as within the whole
vector. For optimizers that need whole tensors the vector is cut between parameters only.
"""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from distplat.platform.even_split import snap_to_boundaries, split_evenly
from distplat.platform.spec import Job
from distplat.platform.vector_layout import Segment
from distplat.strategies.collective import Collective
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optim import LocalOptimizer, optimizer_of
from distplat.strategies.model.optimizer_state import Presence
from distplat.strategies.model.parameter_layout import squared_norm_of, typed, typed_views
from distplat.strategies.reduction.base import ControlSum, Meter, Reducer

_ALIGN = 16
"""Elements: parts start on a cache line, aligned as in a vectorised loop over the whole vector."""


class ShardedUpdate(LocalOptimizer, Reducer):
    """
    Exchange and optimizer in one: `finish` sums gradients, `step` updates (see `Reducer`).

    Args:
        flat: the model, on its final vectors.
        group: all ranks; with one rank nothing is exchanged.
        job: provides optimizer, schedule and clipping.
        total_steps: of the run, for the schedule.
    """

    def __init__(self, flat: FlatModel, group: Collective, job: Job, total_steps: int) -> None:
        assert flat.layout.tail == flat.size, "parts are fixed for the run: no unfreezing"
        self._flat, self._job, self._total = flat, job, total_steps
        self._group, self._rank = group, group.rank
        bounds = split_evenly(flat.size, group.world, align=_ALIGN)
        if job.optimizer.whole:
            bounds = snap_to_boundaries(bounds, flat.layout.starts)
        self._gradients = [
            [typed(flat.grads, a, b, segment.dtype) for a, b in _cut_segment(segment, bounds)]
            for segment in flat.layout.segments
        ]
        """By segment and rank."""
        self._parameters = [flat.params[start:stop] for start, stop in bounds]
        self.bounds, self._bounds = bounds[group.rank], bounds
        self._gradient = flat.grads[slice(*self.bounds)]
        self._part = self._parameters[group.rank]
        self._layout = flat.layout.cut(*self.bounds)
        vectors = self._part, self._gradient, self._layout
        self._optimizer = optimizer_of(job.optimizer, *vectors, job.ema)
        self._check_finite = job.failure.non_finite != "ignore"
        self._control = ControlSum(group, len(flat.slots), flat.grads.device)
        self._meter = Meter(group)
        self._exchange_s = 0.0

    @override
    def finish(self, local: StepControl) -> StepControl:
        """
        Sum the gradients of this rank's part over all ranks, in place; see `Reducer`.

        Unlike other reducers this leaves the rest of `flat.grads` with local gradients.

        Raises:
            CollectiveError: a rank is missing.
        """
        self._meter.begin()
        began = time.perf_counter()
        self._control.start(local.looked_at(self._flat) if self._check_finite else local)
        if self._group.world > 1:
            for parts in self._gradients:
                self._group.reduce_scatter(parts[self._rank], parts)
        total = self._control.wait()
        self._exchange_s = time.perf_counter() - began
        return total

    @override
    def _updated_gradients(self) -> list[Tensor]:
        return typed_views(self._gradient, self._layout.segments)

    @override
    def _update(self, step: int, present: Presence) -> None:
        """
        Update this rank's part, then gather the parts of the other ranks.

        Raises:
            CollectiveError: a rank is missing.
        """
        super()._update(step, present)
        began = time.perf_counter()
        if self._group.world > 1:
            self._group.all_gather(self._parameters, self._part)
        self._exchange_s += time.perf_counter() - began

    @override
    def average(self) -> Tensor:
        """Gathered from all ranks' parts.

        Raises:
            CollectiveError: a rank is missing.
        """
        if self._group.world == 1:
            return self._optimizer.average
        whole = torch.empty_like(self._flat.params)
        parts = [whole[a:b] for a, b in self._bounds]
        self._group.all_gather(parts, self._optimizer.average)
        return whole

    @override
    def figures(self) -> dict[str, float]:
        return {**self._meter.lap(), "exposed_s": self._exchange_s}

    @override
    def state(self) -> dict[str, Tensor]:
        """Return nothing: no rank can send the part that another rank needs."""
        return {}

    @override
    def _norm(self) -> float:
        """Return the 2-norm of the summed gradient over all parts, bitwise equal on all ranks."""
        square = torch.tensor(
            [squared_norm_of(self._gradient, self._layout.segments)],
            dtype=torch.float64,
            device=self._gradient.device,
        )
        if self._group.world > 1:
            self._group.all_reduce(square)
        return math.sqrt(float(square))


def _cut_segment(segment: Segment, bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return each rank's range of a segment, possibly empty."""
    cut = [(max(segment.start, a), min(segment.stop, b)) for a, b in bounds]
    return [(a, max(a, b)) for a, b in cut]
