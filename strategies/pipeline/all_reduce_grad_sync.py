"""
`data_strategy: ring`: what twins do together, the ranks that hold one part of the model.

As under the strategy `ring`: gradients are summed in buckets, each as soon as the pipeline's tail
has made it; running statistics are averaged; a new rank gets its state from a twin.
"""

from __future__ import annotations

from dataclasses import replace

from distplat.platform.errors import StateLost
from distplat.strategies.collective import Collective
from distplat.strategies.pipeline.interfaces import Versions
from distplat.strategies.reduction.buckets import BucketReducer
from distplat.strategies.training.checkpoint_types import CheckpointPart, Holding
from distplat.strategies.training.control import StepControl
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.model_state import ModelState
from distplat.strategies.training.optim import LocalOptimizer
from distplat.strategies.training.parts import model_part, optimizer_part
from distplat.strategies.training.segments import squared_norm_of
from distplat.strategies.training.state_sync import take_over_newest
from distplat.strategies.worker import Context


class PartOptimizer(LocalOptimizer):
    """Updates a part of a model; clips by the norm of the whole one's gradient."""

    norm = 0.0
    """Of the gradient of all parts; to be set before each update of a job that clips."""

    def _norm(self) -> float:
        return self.norm


class AllReduceGradSync:
    """
    One rank's dealings with its twins, over all attempts (see `Exchange`).

    Args:
        flat: the rank's part.
        holding: what of the whole model it is.
        bucket_bytes: about so much is sent at once.
        overlap: send while the pipeline still drains.
    """

    def __init__(
        self, flat: FlatModel, holding: Holding, bucket_bytes: int, *, overlap: bool
    ) -> None:
        self._flat, self._holding = flat, holding
        self._bucket_bytes, self._overlap = bucket_bytes, overlap
        self._reducer: BucketReducer | None = None
        self._state: ModelState | None = None
        self._optimizer: PartOptimizer | None = None
        self._summed = False  #: the summed gradients of the step in flight are there
        self._norm: float | None = None  #: of the whole model's gradient, if it is to be clipped
        self._total = StepControl()  #: of the step in flight
        self._look = True
        self.made = False

    def meet(self, group: Collective | None, context: Context, versions: Versions) -> int:
        """See `Exchange`; what the furthest twin has, all of them take over."""
        self._catch_up(versions)
        self._state = context.state
        self._state.settle(self._flat.version)
        self._state.connect(group)
        version = self._take_over(group, context)
        self._state.keep(version)
        if len({*versions(version)}) > 1:
            raise StateLost("a part of the model")
        return version

    def _catch_up(self, versions: Versions) -> None:
        """Make the update that others have made, if all that it needs is here."""
        flat = self._flat
        newest = max(versions(flat.version))
        self.made = self._summed and flat.version == newest - 1
        if self.made:
            self.update(flat.version, self._total)
            flat.version = newest
        self._summed = False

    def _take_over(self, group: Collective | None, context: Context) -> int:
        flat = self._flat
        old = self._optimizer
        before = old.state() if old is not None and flat.version > 0 else {}
        self._look = context.job.failure.non_finite != "ignore"
        if self._reducer is not None:
            self._reducer.close()
        if group is not None:
            flat.move(flat.params, group.share(flat.grads))
        self._optimizer = PartOptimizer(flat, context.job, context.total_steps)
        saved = (
            context.saved.optimizer(flat, places=self._holding.places)
            if context.saved is not None
            else {}
        )
        self._optimizer.load(before or saved)
        if group is None:
            return flat.version
        bucket_bytes, look = self._bucket_bytes, self._look
        self._reducer = BucketReducer(flat, group, bucket_bytes, overlap=self._overlap, look=look)
        return take_over_newest(flat, self._optimizer, group, context.base)

    def last_backward(self) -> None:
        """Let each bucket go as soon as its last gradient is there."""
        if self._reducer is not None:
            self._reducer.last_backward()

    def pause(self) -> None:
        """Gradients are not final for a while."""
        if self._reducer is not None:
            self._reducer.pause()

    def begin(self, step: int, local: StepControl) -> StepControl:
        """See `Exchange`; the sum is in `flat.grads`."""
        if self._reducer is None:
            mine = local.looked_at(self._flat) if self._look else local
            self._total = mine
            return mine
        if self._state is not None:
            local = replace(local, state_changed=self._state.news(step))
        self._total = self._reducer.finish(local)
        mine = self._reducer.local
        overflow = self._total.non_finite and self._total.rank < 0 and self._total.slot >= 0
        return mine.broken(self._total.slot) if overflow else mine

    def sum_gradients(self, step: int, total: StepControl) -> StepControl:
        """See `Exchange`; `begin` has summed them."""
        if self._state is not None:
            self._state.synchronize(step, self._total.state_changed)
        self._total = replace(total, present=self._total.present)
        return self._total

    def squares(self) -> float:
        """See `Exchange`."""
        flat, uncounted = self._flat, self._holding.uncounted(self._flat)
        return squared_norm_of(flat.grads, flat.layout.segments, uncounted)

    def ready(self, norm: float | None) -> None:
        """See `Exchange`."""
        self._norm, self._summed = norm, True

    def update(self, step: int, total: StepControl) -> None:
        """See `Exchange`; from `flat.grads`, and waits for nobody."""
        assert self._optimizer is not None, "meet() comes first"
        if self._norm is not None:
            self._optimizer.norm = self._norm
        if not total.skip:
            self._optimizer.step(step, total.present, total.scale)
        if self._state is not None and total.skip:
            self._state.leave_out(step + 1)
        elif self._state is not None:
            self._state.keep(step + 1)
        self._summed = False

    def part(self, version: int) -> CheckpointPart:
        """See `Exchange`."""
        assert self._optimizer is not None, "meet() comes first"
        flat, holding = self._flat, self._holding
        memory = self._optimizer.memory()
        return model_part(flat, holding).plus(optimizer_part(flat, memory, 0, holding))

    def figures(self) -> dict[str, float]:
        """Give the exchange's figures and the optimizer's memory."""
        assert self._optimizer is not None, "meet() comes first"
        found = {} if self._reducer is None else self._reducer.figures()
        return {**found, "optimizer_state_bytes": float(self._optimizer.state_bytes)}
