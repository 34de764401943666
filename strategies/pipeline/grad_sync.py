"""Data parallelism of a grid: the ranks that hold the same part of the model sum its gradients."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from distplat.platform.errors import StateLost
from distplat.platform.load import load_figures
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart, Holding
from distplat.strategies.checkpoint.parts import model_part, optimizer_part, server_part
from distplat.strategies.checkpoint.state_sync import take_over_newest
from distplat.strategies.collective import Collective, gather_numbers
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.model_state import ModelState
from distplat.strategies.model.optim import LocalOptimizer, norm_figures
from distplat.strategies.model.parameter_layout import squared_norm_of
from distplat.strategies.pipeline.interfaces import GatherVersions, GradSync
from distplat.strategies.ports import Pushed, Shards
from distplat.strategies.reduction.bucket_reducer import BucketReducer
from distplat.strategies.worker_strategy import Context


class PartOptimizer(LocalOptimizer):
    """Updates a part of a model; clips by the norm of the whole one's gradient."""

    norm = 0.0
    """Of the gradient of all parts; to be set before each update of a job that clips."""

    def _norm(self) -> float:
        return self.norm


class AllReduceGradSync(GradSync):
    """
    One rank's dealings with its peers, over all attempts (see `GradSync`).

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
        self._state: ModelState  #: there after `sync_state`
        self._optimizer: PartOptimizer | None = None
        self._summed = False  #: the summed gradients of the step in flight are there
        self._norm: float | None = None  #: of the whole model's gradient, if it is to be clipped
        self._total = StepControl()  #: of the step in flight
        self._check_finite = True
        self.made: StepControl | None = None

    @override
    def sync_state(
        self, group: Collective | None, context: Context, versions: GatherVersions
    ) -> int:
        """What the furthest peer has, all of them take over."""
        self._catch_up(versions)
        self._state = context.state
        self._state.settle(self._flat.version)
        self._state.connect(group)
        version = self._take_over(group, context)
        self._state.keep(version)
        if len({*versions(version)}) > 1:
            raise StateLost("a part of the model")
        return version

    def _catch_up(self, versions: GatherVersions) -> None:
        """Make the update that others have made, if all that it needs is here."""
        flat = self._flat
        newest = max(versions(flat.version))
        missed = self._summed and flat.version == newest - 1
        self.made = self._total if missed else None
        if missed:
            skip = (
                self._check_finite and not self._total.finite
            )  # or the others would have ended the run
            self.update(flat.version, replace(self._total, skip=skip))
            flat.version = newest
        self._summed = False

    def _take_over(self, group: Collective | None, context: Context) -> int:
        flat = self._flat
        old = self._optimizer
        before = old.state() if old is not None and flat.version > 0 else {}
        self._check_finite = context.job.failure.non_finite != "ignore"
        if self._reducer is not None:
            self._reducer.close()
        if group is not None:
            flat.move(flat.params, group.share(flat.grads))
        self._optimizer = PartOptimizer(flat, context.job, context.total_steps)
        saved = (
            context.saved.optimizer(flat, slices=self._holding.slices)
            if context.saved is not None
            else {}
        )
        self._optimizer.load(before or saved)
        if group is None:
            return flat.version
        bucket_bytes, check_finite = self._bucket_bytes, self._check_finite
        self._reducer = BucketReducer(
            flat, group, bucket_bytes, overlap=self._overlap, check_finite=check_finite
        )
        return take_over_newest(flat, self._optimizer, group, context.checkpoint_step)

    def last_backward(self) -> None:
        """Let each bucket go as soon as its last gradient is there."""
        if self._reducer is not None:
            self._reducer.last_backward()

    def pause(self) -> None:
        """Gradients are not final for a while."""
        if self._reducer is not None:
            self._reducer.pause()

    @override
    def begin(self, step: int, local: StepControl) -> StepControl:
        """The sum is in `flat.grads`."""
        # Without peers, too: evaluations put back what is known.
        changed = self._state.changed(step)
        if self._reducer is None:
            record = local.looked_at(self._flat) if self._check_finite else local
            self._total = record
            return record
        self._total = self._reducer.finish(replace(local, state_changed=changed))
        record = self._reducer.local
        overflow = self._total.non_finite and self._total.rank < 0 and self._total.slot >= 0
        return record.broken(self._total.slot) if overflow else record

    @override
    def sum_gradients(self, step: int, total: StepControl) -> StepControl:
        """`begin` has summed them."""
        self._state.synchronize(step, self._total.state_changed)
        self._total = replace(total, present=self._total.present)
        return self._total

    @override
    def squares(self) -> float:
        flat, duplicate_ranges = self._flat, self._holding.duplicate_ranges(self._flat)
        return squared_norm_of(flat.grads, flat.layout.segments, duplicate_ranges)

    @override
    def ready(self, norm: float | None) -> None:
        self._norm, self._summed = norm, True

    @override
    def update(self, step: int, total: StepControl) -> None:
        """From `flat.grads`, and waits for nobody."""
        assert self._optimizer is not None, "sync_state() comes first"
        if self._norm is not None:
            self._optimizer.norm = self._norm
        self._optimizer.grad_norm = None
        if not total.skip:
            self._optimizer.step(step, total.present, total.scale)
        self._state.finish(step + 1, skipped=total.skip)
        self._summed = False

    @override
    def part(self, version: int) -> CheckpointPart:
        assert self._optimizer is not None, "sync_state() comes first"
        flat, holding = self._flat, self._holding
        memory = self._optimizer.memory()
        return model_part(flat, holding).plus(optimizer_part(flat, memory, 0, holding))

    @override
    def average(self) -> Tensor:
        assert self._optimizer is not None, "sync_state() comes first"
        return self._optimizer.average()

    def figures(self) -> dict[str, float]:
        """Give the exchange's figures and the optimizer's memory."""
        assert self._optimizer is not None, "sync_state() comes first"
        figures = {} if self._reducer is None else self._reducer.figures()
        figures |= norm_figures(self._optimizer.grad_norm)
        return {**figures, "optimizer_state_bytes": float(self._optimizer.state_bytes)}


class PsGradSync(GradSync):
    """
    One rank's dealings with the servers of its part, over all attempts (see `GradSync`).

    Args:
        flat: the rank's part.
        holding: what of the whole model it is.
    """

    def __init__(self, flat: FlatModel, holding: Holding) -> None:
        self._flat, self._holding = flat, holding
        self._shards: Shards  #: there after `sync_state`, as is `_state`
        self._state: ModelState
        self._new = True  #: this rank's buffers are of no version
        self._check_finite, self._dp_world = True, 1
        self._pushed = Pushed()
        self._norm: float | None = None
        self._grad_norm: float | None = None  #: of the step made last
        self._at = 0  #: steps that this rank's buffers have behind them
        #: what they were after one more, if that was made
        self._ahead: list[Tensor | None] | None = None
        self._pushing = False  #: the step after them was pushed, or is about to be
        self._total = StepControl()  #: of that step
        self.made: StepControl | None = None

    @override
    def sync_state(
        self, group: Collective | None, context: Context, versions: GatherVersions
    ) -> int:
        """Parameters are the servers', buffers the peers'."""
        flat = self._flat
        self._check_finite = context.job.failure.non_finite != "ignore"
        self._dp_world = 1 if group is None else group.world
        shards = self._shards = context.shards
        shards.connect(flat, context.saved, self._holding)
        self._state = context.state
        self._state.connect(group, served="use `data_strategy: ring`")
        all_versions = versions(flat.version)
        own_version, version = flat.version, min(all_versions)
        if max(all_versions) > version + 1:
            raise StateLost(f"some part of the model at step {version + 1}")
        # Whoever filled the servers had not what the others began with.
        if version < context.checkpoint_step:
            raise StateLost(f"the state after step {context.checkpoint_step} and later")
        if own_version > version:
            shards.step_back(version)
        self.made = self._total if self._pushing and version == self._at + 1 else None
        self._settle_buffers(version, ahead=own_version > version)
        if group is not None:
            self._share_buffers(group, context)
        self._state.keep(version)
        self._new = False
        return version

    def _settle_buffers(self, version: int, *, ahead: bool) -> None:
        """
        Bring buffers to the parameters' version, if this rank has any.

        Stash the buffers as they were after the step: other stages may commit the step without
        this rank's running it again.

        Args:
            version: of the parameters.
            ahead: whether this part's servers have made one more step.
        """
        own = self._state
        if self._pushing and self._check_finite and not self._total.finite:
            own.restore()  # it is left out
        if not self._new and version > self._at:
            self._go_ahead(own, version)
        elif not self._new:
            if version < self._at:
                own.restore()
            if version < self._at or (ahead and self._pushing):
                self._ahead = own.snapshot()
            if version < self._at:
                own.step_back()
            own.restore()  # this rank's forward of the step is made once more
        self._at, self._pushing = version, False

    def _go_ahead(self, own: ModelState, version: int) -> None:
        """The step in flight was made: take what this rank's buffers were after it."""
        if self.made is None:
            if self._ahead is None or version > self._at + 1:
                self._new = True
                return
            own.load(self._ahead)
        own.keep(version)

    def _share_buffers(self, group: Collective, context: Context) -> None:
        """Give new peers their buffers. Who has none counts as new until all of them are here."""
        flat = self._flat
        device = flat.params.device
        have = gather_numbers([int(not self._new)], group, device)
        holders = [rank for rank, (one,) in enumerate(have) if one]
        first = context.saved.step if context.saved is not None else 0
        if not holders and flat.version != first and self._state.needs_group:
            raise StateLost("buffers of a part of the model")
        if len(holders) < group.world:
            self._state.take_from(holders[0] if holders else 0)

    @override
    def begin(self, step: int, local: StepControl) -> StepControl:
        """Servers decide by all parts' records, so nothing is pushed yet."""
        return local.looked_at(self._flat) if self._check_finite else local

    @override
    def sum_gradients(self, step: int, total: StepControl) -> StepControl:
        """The servers have the sum, and without clipping they have used it."""
        self._state.synchronize(step)
        self._pushing, self._total = True, total
        share = 1.0 / self._dp_world  # the servers of this part add the peers' records up
        record = replace(total, samples=total.samples * share, weight=total.weight * share)
        self._pushed = self._shards.push(step, record)
        return total

    @override
    def squares(self) -> float:
        """0 where a single server clips by itself, and asks for nothing."""
        return (self._pushed.norm or 0.0) ** 2

    @override
    def ready(self, norm: float | None) -> None:
        self._norm = norm

    @override
    def update(self, step: int, total: StepControl) -> None:
        if self._pushed.norm is not None:
            assert self._norm is not None, "ready() comes first"
            self._shards.commit(step, self._norm)
        self._grad_norm = self._pushed.grad_norm if self._pushed.norm is None else self._norm
        if total.skip:
            self._grad_norm = None
        self._state.finish(step + 1, skipped=total.skip)
        self._at, self._pushing, self._ahead = step + 1, False, None

    @override
    def part(self, version: int) -> CheckpointPart:
        return server_part(self._flat, self._shards, version, may_skip=False, holding=self._holding)

    @override
    def average(self) -> Tensor:
        return self._shards.average()

    def figures(self) -> dict[str, float]:
        """Give how long servers held this rank up, and what they did: all of its part together."""
        figures = {"waiting_s": self._pushed.waiting_s, **load_figures(self._pushed.loads)}
        figures |= norm_figures(self._grad_norm)
        return {name: value for name, value in figures.items() if not name.startswith("shard_")}
