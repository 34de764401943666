"""What a worker runs of `ps-async`: push, have it applied, go on with the newest parameters."""

from __future__ import annotations

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
    """Push, have it applied, go on with the newest parameters."""

    _state: ModelState  #: there after `setup`
    _norm: float | None = None  #: of the gradient pushed last, before it was clipped

    def setup(self, context: Context) -> int:
        """
        Take the servers' parameters.

        Tables may lack a task that the shards have, and the other way round: the run goes on with
        the first step of which one of them lacks something, and who has it drops it.
        """
        self._context, self._shards, self._flat = context, context.shards, context.flat
        self._pushes = self._stale_sum = 0
        self._last = Pushed()
        flat = context.flat
        self._shards.connect(flat, context.saved)
        why = "which waits for all ranks: here each goes at its own pace"
        refuse_sync_batch_norm(flat.model, why, "use nn.BatchNorm, or `ring` or `ps-sync`")
        self._state = context.state
        self._state.connect(None, served="use `strategy: ring`", shifting=True)
        if self._state.version is not None:
            self._state.restore()  # what it broke off is made once more
        self._state.keep(flat.version)
        tables = context.table_steps
        return flat.version if tables is None else min(flat.version, tables)

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """
        Push; returns when it is applied and the newest parameters are here.

        As it comes, a sample weighs 1/global batch. Times the world that is the mean over this
        rank's samples where the batch is cut evenly; where it is not, every sample counts alike.
        A weighted loss is divided by the weights of this push.

        Args:
            step: the number of the task.
            local: see `Strategy`; the push is decided by itself.
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

    def update(self, step: int, total: StepControl) -> None:
        """Count; the servers have made the update, or left it out."""
        self._pushes += 1
        if total.skip:
            self._norm = None
        self._state.finish(self._pushes, skipped=total.skip)
        self._stale_sum += self._last.staleness

    def checkpoint(self, version: int) -> CheckpointPart:
        """Rank 0 gives what the servers keep, and its buffers."""
        if self._context.rank != 0:
            return CheckpointPart()
        return server_part(self._context.flat, self._shards, version, may_skip=True)

    def synchronize(self) -> None:
        """Take the newest parameters: at the end, once every task is done, the final ones."""
        self._shards.refresh()

    def figures(self) -> dict[str, float]:
        """Give the staleness of the push just made, its mean so far, and the wait for others."""
        return {
            "staleness": float(self._last.staleness),
            "staleness_mean": self._stale_sum / max(1, self._pushes),
            "waiting_s": self._last.waiting_s,
            **load_figures(self._last.loads),
            "dropped": float(self._last.dropped),
            **norm_figures(self._norm),
        }
