"""The worker's half of `ring`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from typing_extensions import override

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
    Activate the parameters that any rank has unfrozen in this step, and sum their gradients.

    Args:
        flat: the model.
        group: all ranks; each calls this.
        total: the sum of all ranks' control records.
        step: for messages.

    Raises:
        SpecError: This rank has computed gradients in the step while a parameter was frozen that
            other ranks have unfrozen.
    """
    flat.activate_tail(total.present, step)
    if flat.active.any() and group.world > 1:
        for segment in flat.layout.segments:
            if segment.start >= flat.layout.tail:
                group.all_reduce(typed(flat.grads, segment.start, segment.stop, segment.dtype))


class RingWorker(WorkerStrategy[RingOptions]):
    """Sum gradients over all workers, then apply the same update on every worker."""

    _reducer: Reducer | None = None
    _state: ModelState  #: set by `setup`
    _optimizer: LocalOptimizer | ShardedUpdate

    @override
    def can_unfreeze(self) -> bool:
        """Return whether each rank holds the whole optimizer: sharded parts are fixed."""
        return not self.options.shard_optimizer

    @override
    def setup(self, context: Context) -> int:
        """Load the newest parameters of any rank; in a new run those of rank 0."""
        flat, collective = context.flat, context.collective
        self._collective, self._flat = collective, flat
        self._averages = context.job.ema is not None
        self._state = context.state
        self._state.restore_version(flat.version)
        self._state.connect(collective)
        previous = self._reducer
        state = self._optimizer.state() if previous is not None and flat.version > 0 else {}
        if previous is not None:
            previous.close()
        flat.move(flat.params, collective.share(flat.grads))
        if self.options.shard_optimizer:
            self._reducer = self._optimizer = sharded = ShardedUpdate(
                flat, collective, context.job, context.total_steps
            )
            if context.saved is not None:
                sharded.load(context.saved.optimizer(flat, *sharded.bounds))
        else:
            overlap = self.options.overlap and not rows_before_gradients(context.job)
            check_finite = context.job.failure.non_finite != "ignore"
            self._reducer = reducer = _build_reducer(
                self.options, flat, collective, overlap=overlap, check_finite=check_finite
            )
            if isinstance(previous, CompressedReducer) and isinstance(reducer, CompressedReducer):
                reducer.inherit(previous)  # the compression errors of the steps so far
            self._optimizer = context.local_optimizer()
            saved = context.saved.optimizer(flat) if context.saved is not None else {}
            self._optimizer.load(state or saved)
        version = take_over_newest(flat, self._optimizer, collective, context.checkpoint_step)
        flat.fill_tail()
        self._state.keep(version)
        return version

    @override
    def last_backward(self) -> None:
        """Allow each bucket to be sent as soon as its last gradient is computed."""
        assert self._reducer is not None, "setup() comes first"
        # NCCL requires the same order of operations of several communicators on all ranks, but
        # ranks with fewer micro-batches reach the buckets only after the others' last backward.
        if not self._state.ranks_wait:
            self._reducer.last_backward()

    @override
    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Sum the gradients; each rank's are already divided by the global batch."""
        assert self._reducer is not None, "setup() comes first"
        self._state.end_forwards(step)
        total = self._reducer.finish(replace(local, state_changed=self._state.changed(step)))
        sum_tail(self._flat, self._collective, total, step)
        self._state.synchronize(step, total.state_changed)
        return total

    @override
    def update(self, step: int, total: StepControl) -> None:
        """Apply the same update on every rank."""
        if total.skip:
            self._optimizer.grad_norm = None
        else:
            self._optimizer.step(step, total.present, total.scale)
        self._state.finish(step + 1, skipped=total.skip)

    @override
    def checkpoint(self, version: int) -> CheckpointPart:
        """Return model and optimizer on rank 0; a sharded optimizer's parts on every rank."""
        model = model_part(self._flat) if self._collective.rank == 0 else CheckpointPart()
        if self.options.shard_optimizer or self._collective.rank == 0:
            start, _ = self._optimizer.bounds
            return model.plus(optimizer_part(self._flat, self._optimizer.memory(), start))
        return model

    @override
    def average(self) -> Tensor:
        """Return the averaged weights; with a sharded optimizer, gathered from all ranks."""
        return self._optimizer.average()

    @override
    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """Return the model and its averaged weights."""
        if not self._averages:
            return flat.state_dict()
        state = with_average(flat, self.average())
        self._collective.barrier()
        return state

    @override
    def figures(self) -> dict[str, float]:
        """Return metrics of the exchange, the gradient norm and the optimizer's memory."""
        assert self._reducer is not None, "setup() comes first"
        figures = {**self._reducer.figures(), **norm_figures(self._optimizer.grad_norm)}
        figures["optimizer_state_bytes"] = float(self._optimizer.state_bytes)
        return figures


def _build_reducer(
    options: RingOptions,
    flat: FlatModel,
    collective: Collective,
    *,
    overlap: bool,
    check_finite: bool,
) -> Reducer:
    """Build the reducer of the option `compression`."""
    if options.compression == "topk":
        return TopKReducer(flat, collective, options.topk_density, check_finite=check_finite)
    if options.compression == "powersgd":
        return PowerSGDReducer(flat, collective, options.powersgd_rank, check_finite=check_finite)
    wire, bucket_bytes = options.wire_dtype, int(options.bucket_mb * 2**20)
    return BucketReducer(
        flat, collective, bucket_bytes, overlap=overlap, wire_dtype=wire, check_finite=check_finite
    )
