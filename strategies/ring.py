"""
Ring all-reduce: data parallelism without servers (Patarasu & Yuan 2009; Gibiansky 2017).

Every worker holds the whole model. Gradients are summed over a ring, in which each rank sends
2(N-1)/N of their size, bucket by bucket while backward is still running. Then every rank applies
the same update, or with `shard_optimizer` the update of its own part.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

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
    """
    Transport; `auto`: options by the nodes and devices of the workers. The log states the reason.
    """
    timeout_s: Seconds = Field(60.0)
    """Timeout of one operation; the error names the missing ranks."""
    debug: Flag = False
    """Compare every operation between the ranks; by default only the first ones are compared."""
    overlap: Flag = True
    """Reduce each bucket of gradients while backward computes the others."""
    bucket_mb: Positive = Field(8.0, le=1024)
    """Size of a bucket in MiB."""
    compression: Compression = "none"
    """
    Compression of gradients: half precision (`fp16`, `bf16`), largest entries, low-rank factors.
    """
    topk_density: Positive = Field(0.01, le=1)
    """Fraction of the entries that `topk` sends."""
    powersgd_rank: Count = Field(4, le=256)
    """Rank of the factors that `powersgd` sends."""
    shard_optimizer: Flag = False
    """Each worker stores 1/N of the optimizer's state and updates its part (ZeRO-1)."""

    @property
    def wire_dtype(self) -> str | None:
        """Name of the torch dtype to which gradients are cast; None: they are not cast."""
        return {"fp16": "float16", "bf16": "bfloat16"}.get(self.compression)


@register("ring")
class Ring(Strategy[RingOptions]):
    """Sum gradients over all workers, then apply the same update on every worker."""

    summary = "synchronous data parallel: ring all-reduce between workers, no server"
    options_type: ClassVar[type[Options]] = RingOptions
    worker: ClassVar[str | type] = "distplat.strategies.ring_worker:RingWorker"
    has_checkpoints = True
    averages = True
    scales_loss = True
    gathers = True
    updates_whole = True

    @override
    def roles(self, job: Job) -> Roles:
        """Return one group of all workers."""
        options = self.options
        return Roles(
            collective=GroupSpec(
                options.backend, options.timeout_s, options.debug, "strategy.timeout_s"
            )
        )

    @override
    def problems(self, job: Job) -> list[Problem]:
        """Reject options without effect, and combinations that are not supported."""
        options, explicit = self.options, self.options.model_fields_set
        problems = []
        for option, method in (("topk_density", "topk"), ("powersgd_rank", "powersgd")):
            if option in explicit and options.compression != method:
                text = f"has effect only with `compression: {method}` (got {options.compression})"
                problems.append(Problem(("strategy", option), text, "remove it"))
        if options.shard_optimizer and options.compression != "none":
            text = "cannot be combined with `shard_optimizer: true`"
            problems.append(Problem(("strategy", "compression"), text, "choose one of the two"))
        if options.shard_optimizer and "overlap" in explicit and options.overlap:
            text = "has no effect with `shard_optimizer: true`: gradients are sent after backward"
            problems.append(Problem(("strategy", "overlap"), text, "remove it"))
        if options.shard_optimizer and isinstance(job.optimizer, TaskOptimizer):
            text = "splits parameters, but the task's own optimizer needs whole parameters"
            problems.append(Problem(("strategy", "shard_optimizer"), text, "remove it"))
        if options.compression != "none" and job.precision == "fp16":
            text = f"{options.compression!r} cannot send gradients multiplied by a loss scale"
            problems.append(Problem(("strategy", "compression"), text, "remove it, or use bf16"))
        if "overlap" in explicit and options.overlap and rows_before_gradients(job):
            text = "has no effect with `embeddings.asynchronous: true`: rows are sent first"
            problems.append(Problem(("strategy", "overlap"), text, "remove it"))
        if options.backend == "nccl" and not job.scaling.use_gpu:
            text = "`nccl` runs between GPUs only"
            hint = "set scaling.use_gpu: true, or `backend: auto`"
            problems.append(Problem(("strategy", "backend"), text, hint))
        return problems

    @override
    def own_loop_problems(self, job: Job) -> list[Problem]:
        """Reject options of the update, which a train function runs itself."""
        options = self.options
        problems = []
        if options.shard_optimizer:
            text = "is for tasks: a train function has an optimizer of its own"
            problems.append(Problem(("strategy", "shard_optimizer"), text, "remove it"))
        if options.compression in ("topk", "powersgd"):
            text = f"{options.compression!r} keeps an error for the next step, and is for tasks"
            hint = "with a train function use none, fp16 or bf16"
            problems.append(Problem(("strategy", "compression"), text, hint))
        return problems

    @override
    def survives_worker_loss(self) -> bool:
        """
        Return whether each worker holds all state; a sharded optimizer's state is lost with a
        worker.
        """
        return not self.options.shard_optimizer
