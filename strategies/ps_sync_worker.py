"""The worker's half of `ps-sync`."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from distplat.platform.load import load_figures
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
from distplat.strategies.checkpoint.parts import server_part
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.model_state import ModelState
from distplat.strategies.model.optim import norm_figures
from distplat.strategies.model.sync_batch_norm import refuse_sync_batch_norm
from distplat.strategies.ports import Pushed
from distplat.strategies.ps_sync import PsSyncOptions
from distplat.strategies.ps_worker import PsWorker
from distplat.strategies.worker_strategy import Context


class PsSyncWorker(PsWorker[PsSyncOptions]):
    """Push gradients to all shards, commit, and continue with the new version."""

    _state: ModelState  #: set by `setup`

    @override
    def can_unfreeze(self) -> bool:
        """Return True: servers store frozen parameters after the trained ones."""
        return True

    @override
    def setup(self, context: Context) -> int:
        """Move the model to memory that servers can access, and load their parameters."""
        self._context, self._shards = context, context.shards
        self._pushed = Pushed()
        self._skipped = 0
        flat = context.flat
        self._shards.connect(flat, context.saved)
        if context.table_steps is not None and context.table_steps < flat.version:
            self._shards.step_back(context.table_steps)
        if flat.active.size:
            flat.enable_tail(self._shards.seen()[-flat.active.size :])
        self._state = context.state
        self._sync_state(context)
        return flat.version

    def _sync_state(self, context: Context) -> None:
        """Set the untrained state of the servers' version, over a group if necessary."""
        state, flat, backup = context.state, context.flat, self.options.backup_workers
        if backup:
            why = "which waits for all ranks, and `backup_workers` does not"
            refuse_sync_batch_norm(flat.model, why, "remove it, or use nn.BatchNorm")
        group = context.peers() if state.needs_group and not backup else None
        served, shared = "use `strategy: ring`", context.shards.one_memory() and not backup
        state.connect(group, served=served, one_memory=shared, shifting=backup > 0)
        first = context.saved.step if context.saved is not None else 0
        # A rank that stopped before the servers answered does not know the result of the step.
        state.sync(flat.version, first, left_out=self._shards.left_out())

    @override
    def skips(self, step: int) -> bool:
        """Return whether the other ranks have completed the step without this rank."""
        is_late = self._pushed.version > step
        self._skipped += is_late
        if is_late:
            self._state.keep(step + 1)
        return is_late

    @override
    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Push; return when the shards have the gradients that the step needs."""
        self._state.end_forwards(step)
        self._state.synchronize(step)
        if self._context.job.failure.non_finite != "ignore":
            local = local.looked_at(self._context.flat)
        if self.options.backup_workers and local.samples:
            # Servers do not know the samples of dropped gradients: see `DenseStore`.
            local = replace(local, samples=float(sum(self._state.shares.samples(step))))
        self._pushed = self._shards.push(step, local)
        total = (self._pushed.total or local).named(local)
        if self._pushed.version > step + 1:  # the others have already completed a later step
            total = replace(total, readers=0)
        if total.unfrozen:
            self._context.flat.activate_tail(self._shards.seen(), step)
        return total

    @override
    def update(self, step: int, total: StepControl) -> None:
        """Commit the update, if the shards need the gradient's norm over all shards for it."""
        if self._pushed.norm is not None:
            norm = self._pushed.norm
            committed = self._shards.commit(step, norm)
            self._pushed = replace(committed, waiting_s=self._pushed.waiting_s, grad_norm=norm)
        if total.skip:
            self._pushed = replace(self._pushed, grad_norm=None)
        self._state.finish(step + 1, skipped=total.skip)

    @override
    def checkpoint(self, version: int) -> CheckpointPart:
        """Return the servers' state and rank 0's buffers on rank 0, nothing on other ranks."""
        if self._context.rank != 0:
            return CheckpointPart()
        return server_part(
            self._context.flat, self._shards, version, may_skip=bool(self.options.backup_workers)
        )

    @override
    def synchronize(self) -> None:
        """
        Load the newest parameters if ranks may have different versions, which ends with the last
        step.
        """
        may_differ = self._pushed.version < self._context.total_steps
        if self.options.backup_workers and may_differ:
            self._shards.refresh()

    @override
    def figures(self) -> dict[str, float]:
        """
        Return waiting time, load, gradient norm and, with backup workers, dropped and skipped
        steps.
        """
        figures = {"waiting_s": self._pushed.waiting_s, **load_figures(self._pushed.loads)}
        figures |= norm_figures(self._pushed.grad_norm)
        if self.options.backup_workers:
            figures |= {"dropped": float(self._pushed.dropped), "skipped": float(self._skipped)}
        return figures
