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

from typing import ClassVar, Literal

from pydantic import Field

from distplat.platform.errors import Problem
from distplat.platform.spec import Consistency, Job
from distplat.strategies.catalog import register
from distplat.strategies.strategy_spec import GroupSpec, Roles, ServerOptions, Strategy


class PsSyncOptions(ServerOptions):
    """Options of `ps-sync`."""

    backup_workers: int = Field(0, ge=0, le=1023, strict=True)
    """Gradients that a step does not wait for; with it, runs do not repeat bit for bit."""
    split: Literal["bytes", "load"] = "bytes"
    """Shards of equal size, or by how fast each server makes updates, measured at the start."""


@register("ps-sync")
class PsSync(Strategy[PsSyncOptions]):
    """Push gradients to all shards, commit, go on with the new version."""

    summary = "synchronous data parallel: sharded parameter server, updates on the server nodes"
    worker: ClassVar[str | type] = "distplat.strategies.ps_sync_worker:PsSyncWorker"
    has_checkpoints = True
    averages = True
    scales_loss = True
    gathers = True
    options_type = PsSyncOptions

    def roles(self, job: Job) -> Roles:
        """Ask for the server group."""
        chosen = self.options
        if job.own_loop:
            limit_s, setting = job.failure.step_timeout_s, "failure.step_timeout_s"
            group = GroupSpec(timeout_s=limit_s, setting=setting)
            return chosen.roles(Consistency(own_loop=True), collective=group)
        consistency = Consistency(backup_workers=chosen.backup_workers)
        return chosen.roles(consistency, resizes=True, split_by_load=chosen.split == "load")

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
        if backup and job.ema is not None:
            text = "does not go together with `backup_workers`: ranks would see another step's"
            return [Problem(("ema",), text, "remove one of the two")]
        if job.precision == "fp16" and (backup or self.options.wire != "exact"):
            text = "fp16 does not go together with `backup_workers`, nor with a `wire`"
            return [Problem(("precision",), text, "remove it, or use bf16")]
        if self.options.split == "load" and job.optimizer.whole:
            names = " and ".join({one.__name__: 0 for one in job.optimizer.group_classes()})
            text = f"cannot measure a server's speed with {names}"
            return [Problem(("strategy", "split"), text, "remove it")]
        if self.options.split == "load" and self.options.num_servers == 1:
            return [Problem(("strategy", "split"), "has no effect with one server", "remove it")]
        return []

    def own_loop_problems(self, job: Job) -> list[Problem]:
        """Refuse what belongs to an update, which the workers of a train function make."""
        plain, where = PsSyncOptions(), "is for tasks: servers add up gradients of a train function"
        of_tasks = ("backup_workers", "replication", "wire", "split")
        changed = [one for one in of_tasks if getattr(self.options, one) != getattr(plain, one)]
        return [Problem(("strategy", one), where, "remove it") for one in changed]

    def survives_worker_loss(self) -> bool:
        """All state is the servers': a worker that was lost takes none with it."""
        return True
