"""
Synchronous parameter server: data parallel around a server group (Li et al., OSDI 2014).

Server nodes keep the parameters and the optimizer's state, cut into shards of equal size. In each
step every worker pushes its gradients; when all of them are in, every shard sums them in rank
order, updates, and serves the new version. Workers talk to each other only about what servers do
not keep: buffers, frozen parameters, the statistics of `nn.SyncBatchNorm` (docs/model_state.md).

With `backup_workers: b` a step is made of the first N - b gradients; what comes later is dropped,
and its worker goes on with the newest version (Chen et al., 2016, arXiv:1604.00981).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distplat.platform.consistency import Consistency
from distplat.platform.errors import Problem
from distplat.platform.fields import NonNegative
from distplat.platform.load import load_figures
from distplat.platform.spec import Job
from distplat.strategies.base import WIRES, Context, Options, Pushed, Roles, Strategy
from distplat.strategies.catalog import strategies
from distplat.strategies.overlap import NO_EARLY_PUSH

if TYPE_CHECKING:
    from distplat.strategies.training.control import StepControl
    from distplat.strategies.training.model_state import ModelState
    from distplat.strategies.training.parts import Part


class PsSyncOptions(Options):
    """Options of `ps-sync`."""

    removed: ClassVar[Mapping[str, str]] = {"overlap": NO_EARLY_PUSH}
    num_servers: int = Field(1, ge=1, le=256, strict=True)
    """Server nodes; each keeps a part of the parameters."""
    resources_per_server: dict[str, NonNegative] = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of one server node; by default none, for it works while workers wait."""
    backup_workers: int = Field(0, ge=0, le=1023, strict=True)
    """Gradients that a step does not wait for; with it, runs do not repeat bit for bit."""
    replication: int = Field(1, ge=1, le=2, strict=True)
    """2: each shard has a backup, which takes over when its server is lost."""
    wire: Literal["exact", "fp16", "bf16"] = "exact"
    """Type in which gradients and parameters travel between nodes; on a node nothing travels."""
    split: Literal["bytes", "load"] = "bytes"
    """Shards of equal size, or by how fast each server makes updates, measured at the start."""


@strategies.register("ps-sync")
class PsSync(Strategy[PsSyncOptions]):
    """Push gradients to all shards, commit, go on with the new version."""

    summary = "synchronous data parallel: sharded parameter server, updates on the server nodes"
    has_parts = True
    options_type = PsSyncOptions
    _state: ModelState | None = None

    def roles(self, job: Job) -> Roles:
        """Ask for the server group."""
        chosen = self.options
        consistency = Consistency(backup_workers=chosen.backup_workers)
        return Roles(
            chosen.num_servers,
            chosen.resources_per_server,
            consistency,
            replication=chosen.replication,
            resizes=True,
            wire=WIRES[chosen.wire],
            split_by_load=chosen.split == "load",
        )

    def problems(self, job: Job) -> list[Problem]:
        """Refuse more backup workers than can be done without, and shards that would not agree."""
        backup, world = self.options.backup_workers, job.scaling.world
        where = ("strategy", "backup_workers")
        if backup >= world:
            return [Problem(where, f"must be less than the {world} workers (got {backup})")]
        if backup and self.options.num_servers > 1:
            text = "needs `num_servers: 1`: each shard would take other workers' gradients"
            return [Problem(where, text)]
        if backup and self.options.replication > 1:
            text = "does not go together with `replication: 2`"
            return [Problem(where, text)]
        if self.options.split == "load" and self.options.num_servers == 1:
            return [Problem(("strategy", "split"), "has no effect with one server", "remove it")]
        return []

    def can_thaw(self) -> bool:
        """The servers keep frozen parameters behind the others."""
        return True

    def survivors_go_on(self) -> bool:
        """All state is the servers': a worker that was lost takes none with it."""
        return True

    def setup(self, context: Context) -> int:
        """Move the model to where the servers reach it; take their parameters."""
        self._context, self._shards = context, context.shards
        self._pushed = Pushed()
        self._skipped = 0
        flat = context.flat
        self._shards.connect(flat, context.saved)
        if context.tables_made is not None and context.tables_made < flat.version:
            self._shards.step_back(context.tables_made)
        if flat.active.size:
            flat.take_over_tail(self._shards.seen()[-flat.active.size :])
        self._state = context.state
        self._meet(context)
        return flat.version

    def _meet(self, context: Context) -> None:
        """Have the state that goes with the servers' parameters, by a group where one is needed."""
        from distplat.strategies.training.sync_batch_norm import refuse_sync_batch_norm

        state, flat, backup = context.state, context.flat, self.options.backup_workers
        if backup:
            why = "which waits for all ranks, and `backup_workers` does not"
            refuse_sync_batch_norm(flat.model, why, "remove it, or use nn.BatchNorm")
        group = context.peers() if state.needs_group and not backup else None
        served, shared = "use `strategy: ring`", context.shards.one_memory() and not backup
        state.connect(group, served=served, one_memory=shared, shifting=backup > 0)
        state.meet(flat.version, context.saved.step if context.saved is not None else 0)

    def skips(self, step: int) -> bool:
        """Say whether the others have made the step without this rank."""
        late = self._pushed.version > step
        self._skipped += late
        if late and self._state is not None:
            self._state.keep(step + 1)
        return late

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Push; returns when the shards have the gradients that the step needs."""
        assert self._state is not None, "setup() comes first"
        self._state.end_forwards(step)
        self._state.synchronize(step)
        if self._context.job.failure.non_finite != "ignore":
            local = local.looked_at(self._context.flat)
        self._pushed = self._shards.push(step, local)
        total = (self._pushed.total or local).named(local)
        if total.thawed:
            self._context.flat.activate_tail(self._shards.seen(), step)
        return total

    def update(self, step: int, total: StepControl) -> None:
        """Commit, where the shards had to learn the norm over all of them first."""
        assert self._state is not None, "setup() comes first"
        if self._pushed.norm is not None:
            made = self._shards.commit(step, self._pushed.norm)
            self._pushed = replace(made, waiting_s=self._pushed.waiting_s)
        if total.skip:
            self._state.leave_out(step + 1)
        else:
            self._state.keep(step + 1)

    def part(self, version: int) -> Part:
        """Rank 0 gives what the servers keep, and its buffers."""
        from distplat.strategies.training.parts import Part, server_part

        if self._context.rank != 0:
            return Part()
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
        found = {"waiting_s": self._pushed.waiting_s, **load_figures(self._pushed.loads)}
        if self.options.backup_workers:
            found |= {"dropped": float(self._pushed.dropped), "skipped": float(self._skipped)}
        return found
