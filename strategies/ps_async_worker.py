"""The worker's half of `ps-async`."""

from __future__ import annotations

from typing_extensions import override

from distplat.platform.load import load_figures
from distplat.strategies.algorithms.reduce import clip_factor
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
from distplat.strategies.checkpoint.parts import server_part
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.model_state import ModelState
from distplat.strategies.model.optim import norm_figures
from distplat.strategies.model.sync_batch_norm import refuse_sync_batch_norm
from distplat.strategies.ports import Pushed
from distplat.strategies.ps_async import PsAsyncOptions
from distplat.strategies.ps_worker import PsWorker
from distplat.strategies.worker_strategy import Context


class PsAsyncWorker(PsWorker[PsAsyncOptions]):
    """Push gradients that servers apply immediately, and continue with the newest parameters."""

    _state: ModelState  #: set by `setup`
    _norm: float | None = None  #: norm of the last pushed gradient, before clipping

    @override
    def setup(self, context: Context) -> int:
        """
        Load the servers' parameters.

        Tables may lack a task that the shards have applied, and vice versa. The run continues with
        the first step of which either of them lacks a task, and a server that already has the task
        drops it.
        """
        self._context, self._shards, self._flat = context, context.shards, context.flat
        self._pushes = self._stale_sum = 0
        self._last = Pushed()
        flat = context.flat
        self._shards.connect(flat, context.saved)
        why = "which waits for all ranks: ps-async ranks do not run the same steps"
        refuse_sync_batch_norm(flat.model, why, "use nn.BatchNorm, or `ring` or `ps-sync`")
        self._state = context.state
        self._state.connect(None, served="use `strategy: ring`", shifting=True)
        if self._state.version is not None:
            self._state.restore()  # the interrupted task is repeated
        self._state.keep(flat.version)
        tables = context.table_steps
        return flat.version if tables is None else min(flat.version, tables)

    @override
    def exchange(self, step: int, local: StepControl) -> StepControl:
        """
        Push the gradient; return when it is applied and the newest parameters are loaded.

        Each sample has a weight of 1/global batch. Multiplied by the world size this is the mean
        over this rank's samples if the batch is split evenly; if not, all samples still have the
        same weight. A weighted loss is divided by the weights of this push.

        Args:
            step: the number of the task.
            local: this rank's control record. It is also the result, because records are not
                summed.
        """
        self._state.synchronize(self._pushes)
        flat, job = self._flat, self._context.job
        if job.failure.non_finite != "ignore":
            local = local.looked_at(flat)
        scale = self._context.world * local.scale
        if job.clip_norm is not None:
            self._norm = flat.squared_norm() ** 0.5 * scale
            scale *= clip_factor(self._norm, job.clip_norm)
        flat.scale_gradients(scale)
        self._last = self._shards.push(self._pushes, local, step)
        return local

    @override
    def update(self, step: int, total: StepControl) -> None:
        """Count the push: the servers have already applied or skipped the update."""
        self._pushes += 1
        if total.skip:
            self._norm = None
        self._state.finish(self._pushes, skipped=total.skip)
        self._stale_sum += self._last.staleness

    @override
    def checkpoint(self, version: int) -> CheckpointPart:
        """Return the servers' state and rank 0's buffers on rank 0, nothing on other ranks."""
        if self._context.rank != 0:
            return CheckpointPart()
        return server_part(self._context.flat, self._shards, version, may_skip=True)

    @override
    def synchronize(self) -> None:
        """Load the newest parameters, which are the final ones after the last task."""
        self._shards.refresh()

    @override
    def figures(self) -> dict[str, float]:
        """Return staleness (last push, mean), waiting time, load and gradient norm."""
        return {
            "staleness": float(self._last.staleness),
            "staleness_mean": self._stale_sum / max(1, self._pushes),
            "waiting_s": self._last.waiting_s,
            **load_figures(self._last.loads),
            "dropped": float(self._last.dropped),
            **norm_figures(self._norm),
        }
