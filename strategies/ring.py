"""
Ring all-reduce: data parallel without a centre (Patarasu & Yuan 2009; Gibiansky 2017).

Every worker holds the whole model. Gradients are summed around a ring in which each rank sends
2(N-1)/N of their size whatever N is, bucket by bucket while backward goes on; then every rank makes
the same update, or each its own part of it (`shard_optimizer`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from distplat.platform.errors import Problem
from distplat.platform.fields import Count, Flag, Positive, Seconds
from distplat.platform.optimizers import TaskOptimizer
from distplat.platform.spec import Job
from distplat.strategies.catalog import register
from distplat.strategies.strategy_spec import (
    Backend,
    GroupSpec,
    Options,
    Roles,
    Strategy,
    rows_before_gradients,
)

Compression = Literal["none", "fp16", "bf16", "topk", "powersgd"]


class RingOptions(Options):
    """Options of `ring`."""

    backend: Backend = "auto"
    """Transport; `auto`: by where the workers are, and the log says why."""
    timeout_s: Seconds = Field(60.0)
    """Deadline of one operation; the error names the ranks that did not come."""
    debug: Flag = False
    """Compare every operation between the ranks; by default only the first ones."""
    overlap: Flag = True
    """Reduce each bucket of gradients while backward still makes the others."""
    bucket_mb: Positive = Field(8.0, le=1024)
    """Size of a bucket in MiB."""
    compression: Compression = "none"
    """What travels: halves (`fp16`, `bf16`), the largest entries, or low-rank factors."""
    topk_density: Positive = Field(0.01, le=1)
    """Part of the entries that `topk` sends."""
    powersgd_rank: Count = Field(4, le=256)
    """Rank of the factors that `powersgd` sends."""
    shard_optimizer: Flag = False
    """Each worker keeps 1/N of the optimizer's state and updates its part (ZeRO-1)."""

    @property
    def wire_dtype(self) -> str | None:
        """Name of the type in torch to which gradients are cast; None: they are not."""
        return {"fp16": "float16", "bf16": "bfloat16"}.get(self.compression)


@register("ring")
class Ring(Strategy[RingOptions]):
    """Sum gradients over all workers, then update everywhere alike."""

    summary = "synchronous data parallel: ring all-reduce between workers, no server"
    options_type: ClassVar[type[Options]] = RingOptions
    worker: ClassVar[str | type] = "distplat.strategies.ring_worker:RingWorker"
    has_checkpoints = True
    averages = True
    scales_loss = True
    gathers = True
    updates_whole = True

    def roles(self, job: Job) -> Roles:
        """Ask for one group of all workers."""
        chosen = self.options
        return Roles(
            collective=GroupSpec(
                chosen.backend, chosen.timeout_s, chosen.debug, "strategy.timeout_s"
            )
        )

    def problems(self, job: Job) -> list[Problem]:
        """Refuse options that would have no effect."""
        chosen, given = self.options, self.options.model_fields_set
        problems = []
        for option, method in (("topk_density", "topk"), ("powersgd_rank", "powersgd")):
            if option in given and chosen.compression != method:
                text = f"has effect only with `compression: {method}` (got {chosen.compression})"
                problems.append(Problem(("strategy", option), text, "remove it"))
        if chosen.shard_optimizer and chosen.compression != "none":
            text = "cannot be combined with `shard_optimizer: true`"
            problems.append(Problem(("strategy", "compression"), text, "choose one of the two"))
        if chosen.shard_optimizer and "overlap" in given and chosen.overlap:
            text = "has no effect with `shard_optimizer: true`: gradients go when all are there"
            problems.append(Problem(("strategy", "overlap"), text, "remove it"))
        if chosen.shard_optimizer and isinstance(job.optimizer, TaskOptimizer):
            text = "cuts parameters, and the task's own optimizer sees them whole"
            problems.append(Problem(("strategy", "shard_optimizer"), text, "remove it"))
        if chosen.compression != "none" and job.precision == "fp16":
            text = f"{chosen.compression!r} cannot send what a loss scale has made larger"
            problems.append(Problem(("strategy", "compression"), text, "remove it, or use bf16"))
        if "overlap" in given and chosen.overlap and rows_before_gradients(job):
            text = "has no effect with `embeddings.asynchronous: true`: rows go before gradients"
            problems.append(Problem(("strategy", "overlap"), text, "remove it"))
        if chosen.backend == "nccl" and not job.scaling.use_gpu:
            text = "`nccl` runs between GPUs only"
            hint = "set scaling.use_gpu: true, or `backend: auto`"
            problems.append(Problem(("strategy", "backend"), text, hint))
        return problems

    def own_loop_problems(self, job: Job) -> list[Problem]:
        """Refuse what belongs to an update, which a train function makes itself."""
        chosen = self.options
        problems = []
        if chosen.shard_optimizer:
            text = "is for tasks: a train function has an optimizer of its own"
            problems.append(Problem(("strategy", "shard_optimizer"), text, "remove it"))
        if chosen.compression in ("topk", "powersgd"):
            text = f"{chosen.compression!r} keeps what a step owes to the next, and is for tasks"
            hint = "a train function can have none, fp16, bf16"
            problems.append(Problem(("strategy", "compression"), text, hint))
        return problems

    def survives_worker_loss(self) -> bool:
        """Say whether each worker holds all state; parts of a sharded optimizer die with one."""
        return not self.options.shard_optimizer
