"""
What twins do together: the ranks that hold one part of the model, one of each replica.

As under `ring`: gradients are summed in buckets, each as soon as the pipeline's tail has made it;
running statistics are averaged; a new rank gets its state from a twin.
"""

from __future__ import annotations

from torch import Tensor

from distplat.platform.pieces import Place
from distplat.strategies.base import Collective, Context
from distplat.strategies.reduction.buckets import BucketReducer
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.handover import take_over_newest
from distplat.strategies.training.optim import LocalOptimizer
from distplat.strategies.training.running_stats import RunningStatistics


def places_of(flat: FlatModel) -> dict[str, Place]:
    """Say that each tensor of a stage is a whole one of the model."""
    return {name: Place(tuple(t.shape)) for name, t in flat.model.state_dict().items()}


class PartOptimizer(LocalOptimizer):
    """Updates a part of a model; clips by the norm of the whole one's gradient."""

    norm = 0.0
    """Of the gradient of all parts; to be set before each update of a job that clips."""

    def _norm(self) -> float:
        return self.norm


class Twins:
    """
    One rank's dealings with its twins, over all attempts (see `Tail` for the pipeline's side).

    Args:
        flat: the rank's part.
        bucket_bytes: about so much is sent at once.
        overlap: send while the pipeline still drains.
    """

    def __init__(self, flat: FlatModel, bucket_bytes: int, *, overlap: bool) -> None:
        self._flat, self._bucket_bytes, self._overlap = flat, bucket_bytes, overlap
        self._reducer: BucketReducer | None = None
        self._statistics: RunningStatistics | None = None
        self._optimizer: PartOptimizer | None = None

    def meet(self, group: Collective | None, context: Context) -> int:
        """
        Meet in a new attempt, and take over what the furthest twin has; None: there are no twins.

        Returns:
            Steps that the part has behind it.

        Raises:
            CollectiveError: a twin is missing.
        """
        flat = self._flat
        old = self._optimizer
        before = old.state() if old is not None and flat.version > 0 else {}
        if self._reducer is not None:
            self._reducer.close()
        if group is not None:
            flat.move(flat.params, group.share(flat.grads))
        self._optimizer = PartOptimizer(flat, context.job, context.total_steps)
        saved = (
            context.saved.optimizer(flat, places=places_of(flat))
            if context.saved is not None
            else {}
        )
        self._optimizer.load(before or saved)
        if group is None:
            return flat.version
        self._reducer = BucketReducer(flat, group, self._bucket_bytes, overlap=self._overlap)
        if self._statistics is not None:
            self._statistics.restore()
        self._statistics = RunningStatistics(flat.model, group)
        version = take_over_newest(flat, self._optimizer, group, context.base)
        self._statistics.keep()
        return version

    @property
    def listens(self) -> bool:
        """Whether buckets wait for hooks."""
        return self._reducer is not None

    def last_backward(self) -> None:
        """Let each bucket go as soon as its last gradient is there."""
        if self._reducer is not None:
            self._reducer.last_backward()

    def pause(self) -> None:
        """Gradients are not final for a while."""
        if self._reducer is not None:
            self._reducer.pause()

    def sum_gradients(self) -> None:
        """
        Return with the sum over the twins in `flat.grads`.

        Raises:
            CollectiveError: a twin is missing.
        """
        if self._reducer is not None:
            self._reducer.finish()
        if self._statistics is not None:
            self._statistics.average()

    def update(self, step: int, norm: float | None) -> None:
        """
        Make the update of a step from `flat.grads`; waits for nobody.

        Args:
            step: its number.
            norm: of the whole model's gradient, where the job clips.
        """
        assert self._optimizer is not None, "meet() comes first"
        if norm is not None:
            self._optimizer.norm = norm
        self._optimizer.step(step)
        if self._statistics is not None:
            self._statistics.keep()

    def memory(self) -> dict[str, Tensor]:
        """Give what the optimizer remembers, by torch's names; not a copy."""
        assert self._optimizer is not None, "meet() comes first"
        return self._optimizer.memory()

    def figures(self) -> dict[str, float]:
        """Give the exchange's figures and the optimizer's memory."""
        assert self._optimizer is not None, "meet() comes first"
        found = {} if self._reducer is None else self._reducer.figures()
        return {**found, "optimizer_state_bytes": float(self._optimizer.state_bytes)}
