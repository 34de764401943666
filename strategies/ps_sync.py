"""
Synchronous parameter server: data parallel around a server group (Li et al., OSDI 2014).

Server nodes keep the parameters and the optimizer's state, cut into shards of equal size. In each
step every worker pushes its gradients; when all of them are in, every shard sums them in rank
order, updates, and serves the new version. Workers never talk to each other.

With `backup_workers: b` a step is made of the first N - b gradients; what comes later is dropped,
and its worker goes on with the newest version (Chen et al., 2016, arXiv:1604.00981).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distplat.platform.consistency import Consistency
from distplat.platform.errors import Problem
from distplat.platform.fields import Flag, NonNegative
from distplat.platform.load import load_figures
from distplat.platform.spec import Job
from distplat.strategies.base import WIRES, Context, Options, Pushed, Roles, Strategy
from distplat.strategies.catalog import strategies
from distplat.strategies.overlap import overlap_problems, rows_come_first, rows_first_problems

if TYPE_CHECKING:
    from distplat.strategies.training.early import EarlyPush
    from distplat.strategies.training.parts import Part
    from distplat.strategies.training.running_stats import Buffers


class PsSyncOptions(Options):
    """Options of `ps-sync`."""

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
    overlap: Flag = True
    """Push a shard's part while backward still makes the others', where that is safe."""


@strategies.register("ps-sync")
class PsSync(Strategy[PsSyncOptions]):
    """Push gradients to all shards, commit, go on with the new version."""

    summary = "synchronous data parallel: sharded parameter server, updates on the server nodes"
    has_parts = True
    options_type = PsSyncOptions
    _buffers: Buffers | None = None
    _early: EarlyPush | None = None

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
        given = self.options.model_fields_set
        found = overlap_problems(given, self.options.overlap, self.options.num_servers)
        return found or rows_first_problems(given, self.options.overlap, job)

    def can_thaw(self) -> bool:
        """The servers keep frozen parameters behind the others."""
        return True

    def survivors_go_on(self) -> bool:
        """All state is the servers': a worker that was lost takes none with it."""
        return True

    def setup(self, context: Context) -> int:
        """Move the model to where the servers reach it; take their parameters."""
        from distplat.strategies.training.early import EarlyPush  # torch: in workers only
        from distplat.strategies.training.running_stats import Buffers

        if self._early is not None:
            self._early.close()
        self._context, self._shards = context, context.shards
        self._pushed = Pushed()
        self._skipped = 0
        before, flat = context.flat.version, context.flat
        self._shards.connect(flat, context.saved)
        if context.tables_made is not None and context.tables_made < flat.version:
            self._shards.step_back(context.tables_made)
        if self._buffers is not None and flat.version == before:
            self._buffers.restore()  # this rank's forward of the step is made once more
        self._buffers = Buffers(flat.model)
        early = self.options.overlap and not rows_come_first(context.job)
        self._early = EarlyPush(flat, self._shards, overlap=early)
        return flat.version

    def skips(self, step: int) -> bool:
        """Say whether the others have made the step without this rank."""
        late = self._pushed.version > step
        self._skipped += late
        return late

    def last_backward(self, step: int) -> None:
        """Have each shard's part leave as soon as it is complete."""
        if self._early is not None:
            self._early.last_backward(step)

    def exchange(self, step: int) -> None:
        """Push; returns when the shards have the gradients that the step needs."""
        from distplat.strategies.training.shard import from_flags  # torch: in workers only

        assert self._early is not None, "setup() comes first"
        self._early.finish()
        self._pushed = self._shards.push(step)
        present = from_flags(self._pushed.present)
        if present is not None:
            self._context.flat.activate_tail(present, step)

    def update(self, step: int) -> None:
        """Commit, where the shards had to learn the norm over all of them first."""
        assert self._buffers is not None, "setup() comes first"
        if self._pushed.norm is not None:
            made = self._shards.commit(step, self._pushed.norm)
            pushed = self._pushed
            self._pushed = replace(
                made,
                waiting_s=pushed.waiting_s,
                hidden_s=pushed.hidden_s,
                exposed_s=pushed.exposed_s,
            )
        self._buffers.keep()

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
        found |= self._pushed.overlap()
        if self.options.backup_workers:
            found |= {"dropped": float(self._pushed.dropped), "skipped": float(self._skipped)}
        return found
