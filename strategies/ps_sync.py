"""
Synchronous parameter server: data parallelism with a server group (Li et al., OSDI 2014).

Server nodes store the parameters and the optimizer's state, split into shards of equal size. In
each step every worker pushes its gradients. When a shard has the gradients of all workers, it sums
them in rank order, applies the update, and serves the new version. Workers communicate with each
other only for state that servers do not store: buffers, frozen parameters, the statistics of
`nn.SyncBatchNorm` (docs/model_state.md).

With `backup_workers: b` a step uses the first N - b gradients. Later gradients are dropped, and
their workers continue with the newest version (Chen et al., 2016, arXiv:1604.00981).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from distplat.platform.errors import Problem
from distplat.platform.spec import Consistency, Job
from distplat.strategies.catalog import register
from distplat.strategies.strategy_spec import GroupSpec, Roles, ServerOptions, Strategy


class PsSyncOptions(ServerOptions):
    """Options of `ps-sync`."""

    backup_workers: int = Field(0, ge=0, le=1023, strict=True)
    """
    Gradients that a step does not wait for. With backup workers, runs are not bitwise reproducible.
    """
    split: Literal["bytes", "load"] = "bytes"
    """
    `bytes`: shards of equal size. `load`: sized by each server's update speed, measured at the
    start.
    """


@register("ps-sync")
class PsSync(Strategy[PsSyncOptions]):
    """Push gradients to all shards, commit, and continue with the new version."""

    summary = "synchronous data parallel: sharded parameter server, updates on the server nodes"
    worker: ClassVar[str | type] = "distplat.strategies.ps_sync_worker:PsSyncWorker"
    has_checkpoints = True
    averages = True
    scales_loss = True
    gathers = True
    options_type = PsSyncOptions

    @override
    def roles(self, job: Job) -> Roles:
        """Return the server group, and for a train function a collective group."""
        options = self.options
        if job.own_loop:
            limit_s, setting = job.failure.step_timeout_s, "failure.step_timeout_s"
            group = GroupSpec(timeout_s=limit_s, setting=setting)
            return options.roles(Consistency(own_loop=True), collective=group)
        consistency = Consistency(backup_workers=options.backup_workers)
        return options.roles(consistency, resizes=True, split_by_load=options.split == "load")

    @override
    def problems(self, job: Job) -> list[Problem]:
        """Reject invalid numbers of backup workers, and unsupported combinations."""
        backup, world = self.options.backup_workers, job.scaling.world
        where = ("strategy", "backup_workers")
        if backup >= world:
            return [Problem(where, f"must be less than the {world} workers (got {backup})")]
        if backup and self.options.num_servers > 1:
            text = "needs `num_servers: 1`: each shard would take other workers' gradients"
            return [Problem(where, text)]
        if backup and self.options.replication > 1:
            text = "cannot be combined with `replication: 2`"
            return [Problem(where, text)]
        if backup and job.ema is not None:
            text = "cannot be combined with `backup_workers`: ranks would get other steps' averages"
            return [Problem(("ema",), text, "remove one of the two")]
        if job.precision == "fp16" and (backup or self.options.wire != "exact"):
            text = "fp16 cannot be combined with `backup_workers`, nor with a `wire`"
            return [Problem(("precision",), text, "remove it, or use bf16")]
        if self.options.split == "load" and job.optimizer.whole:
            names = " and ".join({cls.__name__: 0 for cls in job.optimizer.group_classes()})
            text = f"cannot measure a server's speed with {names}"
            return [Problem(("strategy", "split"), text, "remove it")]
        if self.options.split == "load" and self.options.num_servers == 1:
            return [Problem(("strategy", "split"), "has no effect with one server", "remove it")]
        return []

    @override
    def own_loop_problems(self, job: Job) -> list[Problem]:
        """Reject options of the servers' update, which a train function's workers run."""
        defaults, names = PsSyncOptions(), ("backup_workers", "replication", "wire", "split")
        changed = [n for n in names if getattr(self.options, n) != getattr(defaults, n)]
        text = "is for tasks: servers only sum the gradients of a train function"
        return [Problem(("strategy", name), text, "remove it") for name in changed]

    @override
    def survives_worker_loss(self) -> bool:
        """Return True: the servers hold all state."""
        return True
