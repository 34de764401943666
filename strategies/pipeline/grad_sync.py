"""Data parallelism of a grid: gradient sync among the ranks that hold the same model part."""

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
    """Updates a part of a model; clips by the norm of the whole model's gradient."""

    norm = 0.0
    """2-norm of the gradient of all parts; set before each update if the job clips."""

    @override
    def _norm(self) -> float:
        return self.norm


class AllReduceGradSync(GradSync):
    """
    Gradient sync by all-reduce among data-parallel peers (see `GradSync`).

    Args:
        flat: the rank's part.
        holding: position of the part in the whole model.
        bucket_bytes: approximate size of a bucket.
        overlap: send buckets while the pipeline still drains.
    """

    def __init__(
        self, flat: FlatModel, holding: Holding, bucket_bytes: int, *, overlap: bool
    ) -> None:
        self._flat, self._holding = flat, holding
        self._bucket_bytes, self._overlap = bucket_bytes, overlap
        self._reducer: BucketReducer | None = None
        self._state: ModelState  #: set by `sync_state`
        self._optimizer: PartOptimizer | None = None
        self._is_summed = False  #: whether the gradients of the step in flight are summed
        self._norm: float | None = None  #: of the whole model's gradient, if the job clips
        self._total = StepControl()  #: of the step in flight
        self._check_finite = True
        self.completed: StepControl | None = None

    @override
    def sync_state(
        self, group: Collective | None, context: Context, versions: GatherVersions
    ) -> int:
        """All peers take over the state of the peer with the newest version."""
        self._catch_up(versions)
        self._state = context.state
        self._state.restore_version(self._flat.version)
        self._state.connect(group)
        version = self._take_over(group, context)
        self._state.keep(version)
        if len({*versions(version)}) > 1:
            raise StateLost("a part of the model")
        return version

    def _catch_up(self, versions: GatherVersions) -> None:
        """Apply the update that other ranks have applied, if the summed gradients are here."""
        flat = self._flat
        newest = max(versions(flat.version))
        missed = self._is_summed and flat.version == newest - 1
        self.completed = self._total if missed else None
        if missed:
            # If the job did not skip such steps, the other ranks would have ended the run.
            skip = self._check_finite and not self._total.finite
            self.update(flat.version, replace(self._total, skip=skip))
            flat.version = newest
        self._is_summed = False

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

    @override
    def last_backward(self) -> None:
        """Send each bucket as soon as its last gradient is computed."""
        if self._reducer is not None:
            self._reducer.last_backward()

    @override
    def pause(self) -> None:
        """Stop sending: following backwards do not make gradients final."""
        if self._reducer is not None:
            self._reducer.pause()

    @override
    def begin(self, step: int, local: StepControl) -> StepControl:
        """The sum is in `flat.grads`."""
        # Needed without peers, too: evaluations restore the recorded buffers.
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
        """`begin` has summed the gradients."""
        self._state.synchronize(step, self._total.state_changed)
        self._total = replace(total, present=self._total.present)
        return self._total

    @override
    def squared_norm(self) -> float:
        flat, duplicate_ranges = self._flat, self._holding.duplicate_ranges(self._flat)
        return squared_norm_of(flat.grads, flat.layout.segments, duplicate_ranges)

    @override
    def prepare_update(self, norm: float | None) -> None:
        self._norm, self._is_summed = norm, True

    @override
    def update(self, step: int, total: StepControl) -> None:
        """Updates from `flat.grads`, without communication."""
        assert self._optimizer is not None, "sync_state() comes first"
        if self._norm is not None:
            self._optimizer.norm = self._norm
        self._optimizer.grad_norm = None
        if not total.skip:
            self._optimizer.step(step, total.present, total.scale)
        self._state.finish(step + 1, skipped=total.skip)
        self._is_summed = False

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

    @override
    def figures(self) -> dict[str, float]:
        """Return figures of the all-reduce and the size of the optimizer state."""
        assert self._optimizer is not None, "sync_state() comes first"
        figures = {} if self._reducer is None else self._reducer.figures()
        figures |= norm_figures(self._optimizer.grad_norm)
        return {**figures, "optimizer_state_bytes": float(self._optimizer.state_bytes)}


class PsGradSync(GradSync):
    """
    Gradient sync by the parameter servers of one part of the model (see `GradSync`).

    Args:
        flat: the rank's part.
        holding: position of the part in the whole model.
    """

    def __init__(self, flat: FlatModel, holding: Holding) -> None:
        self._flat, self._holding = flat, holding
        self._shards: Shards  #: set by `sync_state`
        self._state: ModelState  #: set by `sync_state`
        self._is_new = True  #: this rank's buffers belong to no version
        self._check_finite, self._dp_world = True, 1
        self._pushed = Pushed()
        self._norm: float | None = None
        self._grad_norm: float | None = None  #: of the last step
        self._buffers_version = 0  #: completed steps of this rank's buffers
        #: buffers after the next step, if the servers applied that step
        self._ahead: list[Tensor | None] | None = None
        self._pushing = False  #: the next step was pushed, or is about to be
        self._total = StepControl()  #: of the next step
        self.completed: StepControl | None = None

    @override
    def sync_state(
        self, group: Collective | None, context: Context, versions: GatherVersions
    ) -> int:
        """Parameters come from the servers, buffers from the peers."""
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
        # The rank that filled the servers had older values than the checkpoint.
        if version < context.checkpoint_step:
            raise StateLost(f"the state after step {context.checkpoint_step} and later")
        if own_version > version:
            shards.step_back(version)
        completes = self._pushing and version == self._buffers_version + 1
        self.completed = self._total if completes else None
        self._restore_buffers(version, ahead=own_version > version)
        if group is not None:
            self._share_buffers(group, context)
        self._state.keep(version)
        self._is_new = False
        return version

    def _restore_buffers(self, version: int, *, ahead: bool) -> None:
        """
        Bring this rank's buffers, if it has any, to the parameters' version.

        The buffers after the step are stashed: other stages may commit the step without this rank
        running it again.

        Args:
            version: of the parameters.
            ahead: whether this part's servers have applied one more step.
        """
        state = self._state
        if self._pushing and self._check_finite and not self._total.finite:
            state.restore()  # the step is skipped
        if not self._is_new and version > self._buffers_version:
            self._advance_buffers(version)
        elif not self._is_new:
            rolls_back = version < self._buffers_version
            if rolls_back:
                state.restore()
            if rolls_back or (ahead and self._pushing):
                self._ahead = state.snapshot()
            if rolls_back:
                state.step_back()
            state.restore()  # this rank runs the forward of the step again
        self._buffers_version, self._pushing = version, False

    def _advance_buffers(self, version: int) -> None:
        """Load this rank's buffers after the step in flight, which was applied."""
        if self.completed is None:
            if self._ahead is None or version > self._buffers_version + 1:
                self._is_new = True
                return
            self._state.load(self._ahead)
        self._state.keep(version)

    def _share_buffers(self, group: Collective, context: Context) -> None:
        """Send buffers to new peers; a rank without buffers stays new until it has received all."""
        flat = self._flat
        device = flat.params.device
        flags = gather_numbers([int(not self._is_new)], group, device)
        holders = [rank for rank, (has_buffers,) in enumerate(flags) if has_buffers]
        first = context.saved.step if context.saved is not None else 0
        if not holders and flat.version != first and self._state.needs_group:
            raise StateLost("buffers of a part of the model")
        if len(holders) < group.world:
            self._state.broadcast_from(holders[0] if holders else 0)

    @override
    def begin(self, step: int, local: StepControl) -> StepControl:
        """Nothing is pushed yet: servers need the records of all parts."""
        return local.looked_at(self._flat) if self._check_finite else local

    @override
    def sum_gradients(self, step: int, total: StepControl) -> StepControl:
        """Pushes to the servers, which apply the sum unless the job clips."""
        self._state.synchronize(step)
        self._pushing, self._total = True, total
        share = 1.0 / self._dp_world  # the servers of this part sum the peers' records
        record = replace(total, samples=total.samples * share, weight=total.weight * share)
        self._pushed = self._shards.push(step, record)
        return total

    @override
    def squared_norm(self) -> float:
        """0 if a single server clips by itself."""
        return (self._pushed.norm or 0.0) ** 2

    @override
    def prepare_update(self, norm: float | None) -> None:
        self._norm = norm

    @override
    def update(self, step: int, total: StepControl) -> None:
        if self._pushed.norm is not None:
            assert self._norm is not None, "prepare_update() comes first"
            self._shards.commit(step, self._norm)
        self._grad_norm = self._pushed.grad_norm if self._pushed.norm is None else self._norm
        if total.skip:
            self._grad_norm = None
        self._state.finish(step + 1, skipped=total.skip)
        self._buffers_version, self._pushing, self._ahead = step + 1, False, None

    @override
    def part(self, version: int) -> CheckpointPart:
        return server_part(self._flat, self._shards, version, may_skip=False, holding=self._holding)

    @override
    def average(self) -> Tensor:
        return self._shards.average()

    @override
    def figures(self) -> dict[str, float]:
        """Return this rank's wait for servers and their load, summed over the part's servers."""
        figures = {"waiting_s": self._pushed.waiting_s, **load_figures(self._pushed.loads)}
        figures |= norm_figures(self._grad_norm)
        return {name: value for name, value in figures.items() if not name.startswith("shard_")}
