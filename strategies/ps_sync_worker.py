"""What a worker runs of `ps-sync`: push to all shards, commit, go on with the new version."""

from __future__ import annotations

from dataclasses import replace

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
    """Push gradients to all shards, commit, go on with the new version."""

    _state: ModelState  #: there after `setup`

    def can_unfreeze(self) -> bool:
        """The servers keep frozen parameters behind the others."""
        return True

    def setup(self, context: Context) -> int:
        """Move the model to where the servers reach it; take their parameters."""
        self._context, self._shards = context, context.shards
        self._pushed = Pushed()
        self._skipped = 0
        flat = context.flat
        self._shards.connect(flat, context.saved)
        if context.table_steps is not None and context.table_steps < flat.version:
            self._shards.step_back(context.table_steps)
        if flat.active.size:
            flat.take_over_tail(self._shards.seen()[-flat.active.size :])
        self._state = context.state
        self._sync_state(context)
        return flat.version

    def _sync_state(self, context: Context) -> None:
        """Have the state that goes with the servers' parameters, by a group where one is needed."""
        state, flat, backup = context.state, context.flat, self.options.backup_workers
        if backup:
            why = "which waits for all ranks, and `backup_workers` does not"
            refuse_sync_batch_norm(flat.model, why, "remove it, or use nn.BatchNorm")
        group = context.peers() if state.needs_group and not backup else None
        served, shared = "use `strategy: ring`", context.shards.one_memory() and not backup
        state.connect(group, served=served, one_memory=shared, shifting=backup > 0)
        first = context.saved.step if context.saved is not None else 0
        # Whoever was stopped before the servers answered does not know what became of the step.
        state.sync(flat.version, first, left_out=self._shards.left_out())

    def skips(self, step: int) -> bool:
        """Say whether the others have made the step without this rank."""
        late = self._pushed.version > step
        self._skipped += late
        if late:
            self._state.keep(step + 1)
        return late

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Push; returns when the shards have the gradients that the step needs."""
        self._state.end_forwards(step)
        self._state.synchronize(step)
        if self._context.job.failure.non_finite != "ignore":
            local = local.looked_at(self._context.flat)
        self._pushed = self._shards.push(step, local)
        total = (self._pushed.total or local).named(local)
        if self._pushed.version > step + 1:  # of a later step, which the others have made meanwhile
            total = replace(total, readers=0)
        if total.unfrozen:
            self._context.flat.activate_tail(self._shards.seen(), step)
        return total

    def update(self, step: int, total: StepControl) -> None:
        """Commit, where the shards had to learn the norm over all of them first."""
        if self._pushed.norm is not None:
            norm = self._pushed.norm
            committed = self._shards.commit(step, norm)
            self._pushed = replace(committed, waiting_s=self._pushed.waiting_s, grad_norm=norm)
        if total.skip:
            self._pushed = replace(self._pushed, grad_norm=None)
        self._state.finish(step + 1, skipped=total.skip)

    def checkpoint(self, version: int) -> CheckpointPart:
        """Rank 0 gives what the servers keep, and its buffers."""
        if self._context.rank != 0:
            return CheckpointPart()
        return server_part(
            self._context.flat, self._shards, version, may_skip=bool(self.options.backup_workers)
        )

    def synchronize(self) -> None:
        """Take the newest parameters, where ranks may be apart; after the last step none are."""
        apart = self._pushed.version < self._context.total_steps
        if self.options.backup_workers and apart:
            self._shards.refresh()

    def figures(self) -> dict[str, float]:
        """Give how long servers held this rank up, what they did, and what gradients came to."""
        figures = {"waiting_s": self._pushed.waiting_s, **load_figures(self._pushed.loads)}
        figures |= norm_figures(self._pushed.grad_norm)
        if self.options.backup_workers:
            figures |= {"dropped": float(self._pushed.dropped), "skipped": float(self._skipped)}
        return figures
