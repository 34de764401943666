"""What a worker runs of `ring`: reduce gradients over all ranks, then update everywhere alike."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
from distplat.strategies.checkpoint.parts import model_part, optimizer_part
from distplat.strategies.checkpoint.state_sync import take_over_newest
from distplat.strategies.collective import Collective
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.ema import with_average
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.model_state import ModelState
from distplat.strategies.model.optim import LocalOptimizer, norm_figures
from distplat.strategies.model.parameter_layout import typed
from distplat.strategies.reduction.base import Reducer
from distplat.strategies.reduction.bucket_reducer import BucketReducer
from distplat.strategies.reduction.compressed import CompressedReducer, PowerSGDReducer, TopKReducer
from distplat.strategies.reduction.sharded import ShardedUpdate
from distplat.strategies.ring import RingOptions
from distplat.strategies.strategy_spec import rows_before_gradients
from distplat.strategies.worker_strategy import Context, WorkerStrategy


def sum_tail(flat: FlatModel, group: Collective, total: StepControl, step: int) -> None:
    """
    Train from this step on what some rank has unfrozen in it, and sum the tail's gradients.

    Args:
        flat: the model.
        group: all ranks; each calls this.
        total: their control records, summed.
        step: for messages.

    Raises:
        SpecError: this rank has computed something in the step, and with a parameter frozen that
            others have unfrozen.
    """
    flat.activate_tail(total.present, step)
    if flat.active.any() and group.world > 1:
        for segment in flat.layout.segments:
            if segment.start >= flat.layout.tail:
                group.all_reduce(typed(flat.grads, segment.start, segment.stop, segment.dtype))


class RingWorker(WorkerStrategy[RingOptions]):
    """Sum gradients over all workers, then update everywhere alike."""

    _reducer: Reducer | None = None
    _state: ModelState  #: there after `setup`
    _optimizer: LocalOptimizer | ShardedUpdate

    def can_unfreeze(self) -> bool:
        """Say whether ranks hold all of the optimizer; its parts are cut once for all."""
        return not self.options.shard_optimizer

    def setup(self, context: Context) -> int:
        """Take over the newest parameters that a rank has; in a fresh run those of rank 0."""
        flat, collective = context.flat, context.collective
        self._collective, self._flat = collective, flat
        self._averages = context.job.ema is not None
        self._state = context.state
        self._state.settle(flat.version)
        self._state.connect(collective)
        old = self._reducer
        before = self._optimizer.state() if old is not None and flat.version > 0 else {}
        if old is not None:
            old.close()
        flat.move(flat.params, collective.share(flat.grads))
        if self.options.shard_optimizer:
            self._reducer = self._optimizer = sharded = ShardedUpdate(
                flat, collective, context.job, context.total_steps
            )
            if context.saved is not None:
                sharded.load(context.saved.optimizer(flat, *sharded.bounds))
        else:
            early = self.options.overlap and not rows_before_gradients(context.job)
            check_finite = context.job.failure.non_finite != "ignore"
            self._reducer = _reducer(
                self.options, flat, collective, overlap=early, check_finite=check_finite
            )
            if isinstance(old, CompressedReducer) and isinstance(self._reducer, CompressedReducer):
                self._reducer.inherit(old)  # what it still owes, if this rank was there before
            self._optimizer = context.local_optimizer()
            saved = context.saved.optimizer(flat) if context.saved is not None else {}
            self._optimizer.load(before or saved)
        version = take_over_newest(flat, self._optimizer, collective, context.checkpoint_step)
        flat.fill_tail()
        self._state.keep(version)
        return version

    def last_backward(self) -> None:
        """Let each bucket go as soon as its last gradient is there."""
        assert self._reducer is not None, "setup() comes first"
        # NCCL wants operations of several communicators in one order on all ranks, and ranks with
        # fewer micro-batches come to the buckets after the others' last backward only.
        if not self._state.ranks_wait:
            self._reducer.last_backward()

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Sum the gradients; each rank's are already divided by the global batch."""
        assert self._reducer is not None, "setup() comes first"
        self._state.end_forwards(step)
        total = self._reducer.finish(replace(local, state_changed=self._state.changed(step)))
        sum_tail(self._flat, self._collective, total, step)
        self._state.synchronize(step, total.state_changed)
        return total

    def update(self, step: int, total: StepControl) -> None:
        """Make the same update on every rank."""
        if total.skip:
            self._optimizer.grad_norm = None
        else:
            self._optimizer.step(step, total.present, total.scale)
        self._state.finish(step + 1, skipped=total.skip)

    def checkpoint(self, version: int) -> CheckpointPart:
        """Rank 0 gives the model and the optimizer's state; a sharded one each rank for itself."""
        model = model_part(self._flat) if self._collective.rank == 0 else CheckpointPart()
        if self.options.shard_optimizer or self._collective.rank == 0:
            start, _ = self._optimizer.bounds
            return model.plus(optimizer_part(self._flat, self._optimizer.memory(), start))
        return model

    def average(self) -> Tensor:
        """Give the optimizer's; of a sharded one the parts of all ranks."""
        return self._optimizer.average()

    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """Give the model, and the average of its weights."""
        if not self._averages:
            return flat.state_dict()
        state = with_average(flat, self.average())
        self._collective.barrier()
        return state

    def figures(self) -> dict[str, float]:
        """Give the exchange's figures and the optimizer's memory."""
        assert self._reducer is not None, "setup() comes first"
        own = norm_figures(self._optimizer.grad_norm)
        own["optimizer_state_bytes"] = float(self._optimizer.state_bytes)
        return {**self._reducer.figures(), **own}


def _reducer(
    options: RingOptions,
    flat: FlatModel,
    collective: Collective,
    *,
    overlap: bool,
    check_finite: bool,
) -> Reducer:
    """Make what `compression` names."""
    if options.compression == "topk":
        return TopKReducer(flat, collective, options.topk_density, check_finite=check_finite)
    if options.compression == "powersgd":
        return PowerSGDReducer(flat, collective, options.powersgd_rank, check_finite=check_finite)
    wire, bucket_bytes = options.wire_dtype, int(options.bucket_mb * 2**20)
    return BucketReducer(
        flat, collective, bucket_bytes, overlap=overlap, wire_dtype=wire, check_finite=check_finite
    )
