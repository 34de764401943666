"""
Ring all-reduce: data parallel without a centre (Patarasu & Yuan 2009; Gibiansky 2017).

Every worker holds the whole model. Gradients are summed around a ring in which each rank sends
2(N-1)/N of their size whatever N is, bucket by bucket while backward goes on; then every rank makes
the same update, or each its own part of it (`shard_optimizer`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distplat.platform.errors import Problem
from distplat.platform.fields import Count, Flag, Positive, Seconds
from distplat.platform.spec import Job
from distplat.strategies.base import Collective, Context, GroupSpec, Options, Roles, Strategy
from distplat.strategies.catalog import strategies
from distplat.strategies.overlap import rows_come_first, rows_first_problems

if TYPE_CHECKING:
    from distplat.strategies.reduction.base import Reducer
    from distplat.strategies.reduction.sharded import ShardedUpdate
    from distplat.strategies.training.control import StepControl
    from distplat.strategies.training.flat import FlatModel
    from distplat.strategies.training.model_state import ModelState
    from distplat.strategies.training.optim import LocalOptimizer
    from distplat.strategies.training.parts import Part

Backend = Literal["auto", "shm", "gloo", "nccl", "hierarchical"]
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


@strategies.register("ring")
class Ring(Strategy[RingOptions]):
    """Sum gradients over all workers, then update everywhere alike."""

    summary = "synchronous data parallel: ring all-reduce between workers, no server"
    options_type: ClassVar[type[Options]] = RingOptions
    has_parts = True
    _reducer: Reducer | None = None
    _state: ModelState | None = None
    _optimizer: LocalOptimizer | ShardedUpdate

    def roles(self, job: Job) -> Roles:
        """Ask for one group of all workers."""
        chosen = self.options
        return Roles(collective=GroupSpec(chosen.backend, chosen.timeout_s, chosen.debug))

    def problems(self, job: Job) -> list[Problem]:
        """Refuse options that would have no effect."""
        chosen, given = self.options, self.options.model_fields_set
        found = []
        for option, method in (("topk_density", "topk"), ("powersgd_rank", "powersgd")):
            if option in given and chosen.compression != method:
                text = f"has effect only with `compression: {method}` (got {chosen.compression})"
                found.append(Problem(("strategy", option), text, "remove it"))
        if chosen.shard_optimizer and chosen.compression != "none":
            text = "cannot be combined with `shard_optimizer: true`"
            found.append(Problem(("strategy", "compression"), text, "choose one of the two"))
        if chosen.shard_optimizer and "overlap" in given and chosen.overlap:
            text = "has no effect with `shard_optimizer: true`: gradients go when all are there"
            found.append(Problem(("strategy", "overlap"), text, "remove it"))
        found += rows_first_problems(given, chosen.overlap, job)
        if chosen.backend == "nccl" and not job.scaling.use_gpu:
            text = "`nccl` runs between GPUs only"
            hint = "set scaling.use_gpu: true, or `backend: auto`"
            found.append(Problem(("strategy", "backend"), text, hint))
        return found

    def can_thaw(self) -> bool:
        """Say whether ranks hold all of the optimizer; its parts are cut once for all."""
        return not self.options.shard_optimizer

    def survivors_go_on(self) -> bool:
        """Say whether each worker holds all state; parts of a sharded optimizer die with one."""
        return not self.options.shard_optimizer

    def setup(self, context: Context) -> int:
        """Take over the newest parameters that a rank has; in a fresh run those of rank 0."""
        from distplat.strategies.training.handover import take_over_newest  # torch: in workers only

        flat, collective = context.flat, context.collective
        self._collective, self._device, self._flat = collective, flat.params.device, flat
        self._state = context.state
        self._state.settle(flat.version)
        self._state.connect(collective)
        old = self._reducer
        before = self._optimizer.state() if old is not None and flat.version > 0 else {}
        if old is not None:
            old.close()
        flat.move(flat.params, collective.share(flat.grads))
        if self.options.shard_optimizer:
            self._reducer = self._optimizer = sharded = _sharded(context)
            if context.saved is not None:
                sharded.load(context.saved.optimizer(flat, *sharded.bounds))
        else:
            early = self.options.overlap and not rows_come_first(context.job)
            look = context.job.failure.non_finite != "ignore"
            self._reducer = _reducer(self.options, flat, collective, overlap=early, look=look)
            _pass_residual_on(old, self._reducer)
            self._optimizer = context.local_optimizer()
            saved = context.saved.optimizer(flat) if context.saved is not None else {}
            self._optimizer.load(before or saved)
        version = take_over_newest(flat, self._optimizer, collective, context.base)
        flat.fill_tail()
        self._state.keep(version)
        return version

    def last_backward(self, step: int) -> None:
        """Let each bucket go as soon as its last gradient is there."""
        assert self._reducer is not None, "setup() comes first"
        self._reducer.last_backward()

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Sum the gradients; each rank's are already divided by the global batch."""
        from distplat.strategies.reduction.tail import sum_tail

        assert self._reducer is not None and self._state is not None, "setup() comes first"
        self._state.end_forwards(step)
        total = self._reducer.finish(replace(local, state_changed=self._state.news(step)))
        sum_tail(self._flat, self._collective, total, step)
        self._state.synchronize(step, total.state_changed)
        return total

    def update(self, step: int, total: StepControl) -> None:
        """Make the same update on every rank."""
        assert self._state is not None, "setup() comes first"
        if total.skip:
            self._state.leave_out(step + 1)
            return
        self._optimizer.step(step, total.present, total.scale)
        self._state.keep(step + 1)

    def part(self, version: int) -> Part:
        """Rank 0 gives the model and the optimizer's state; a sharded one each rank for itself."""
        from distplat.strategies.training.parts import Part, model_part, optimizer_part

        model = model_part(self._flat) if self._collective.rank == 0 else Part()
        if self.options.shard_optimizer or self._collective.rank == 0:
            start, _ = self._optimizer.bounds
            return model.plus(optimizer_part(self._flat, self._optimizer.memory(), start))
        return model

    def gather(self, data: bytes) -> list[bytes]:
        """Give every rank what all brought."""
        from distplat.strategies.training.words import gather_bytes

        return gather_bytes(data, self._collective, self._device)

    def figures(self) -> dict[str, float]:
        """Give the exchange's figures and the optimizer's memory."""
        assert self._reducer is not None, "setup() comes first"
        memory = float(self._optimizer.state_bytes)
        return {**self._reducer.figures(), "optimizer_state_bytes": memory}


def _sharded(context: Context) -> ShardedUpdate:
    from distplat.strategies.reduction.sharded import ShardedUpdate

    return ShardedUpdate(context.flat, context.collective, context.job, context.total_steps)


def _pass_residual_on(old: Reducer | None, new: Reducer) -> None:
    """Keep what compression still owes, where this rank was in the run before."""
    from distplat.strategies.reduction.compressed import CompressedReducer

    if isinstance(old, CompressedReducer) and isinstance(new, CompressedReducer):
        new.inherit(old)


def _reducer(
    options: RingOptions, flat: FlatModel, collective: Collective, *, overlap: bool, look: bool
) -> Reducer:
    """Make what `compression` names."""
    if options.compression == "topk":
        from distplat.strategies.reduction.topk import TopKReducer

        return TopKReducer(flat, collective, options.topk_density, look=look)
    if options.compression == "powersgd":
        from distplat.strategies.reduction.powersgd import PowerSGDReducer

        return PowerSGDReducer(flat, collective, options.powersgd_rank, look=look)
    from distplat.strategies.reduction.buckets import BucketReducer

    wire = {"none": None, "fp16": "float16", "bf16": "bfloat16"}[options.compression]
    bucket_bytes = int(options.bucket_mb * 2**20)
    return BucketReducer(
        flat, collective, bucket_bytes, overlap=overlap, wire_dtype=wire, look=look
    )
