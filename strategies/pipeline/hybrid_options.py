"""The options of `hybrid`, and their validation against each other and the job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from distplat.platform.errors import Problem, hint
from distplat.platform.fields import Count, Flag, Positive, Resources, Seconds
from distplat.platform.spec import Job
from distplat.platform.topology import Grid
from distplat.strategies.strategy_spec import Backend, Options
from distplat.strategies.tensor.parallel_plan import check_styles

_PER_STAGE = 4
"""Default micro-batches per stage; limits the bubble to a fifth."""


class HybridOptions(Options):
    """Options of `hybrid`."""

    removed_fields: ClassVar[Mapping[str, str]] = {
        "pack_weights": "it was removed: each micro-batch's products are computed at once"
    }

    pipeline: Count = Field(1, le=1024)
    """Pipeline stages; each runs on one worker (or `tensor` workers). By default the number of
    workers divided by the other sizes; without `data` its smallest divisor above 1."""
    tensor: Count = Field(1, le=1024)
    """Workers that share the layers of one stage (tensor parallelism)."""
    data: Count = Field(1, le=1024)
    """Replicas of the model, each with a part of every batch; by default the number of workers
    divided by the other sizes."""
    data_strategy: Literal["ring", "ps-sync"] = "ring"
    """Gradient sync of the replicas: `ring` all-reduces each stage's gradients; `ps-sync` pushes
    them to server nodes, of which each stage and slice has its own."""
    num_servers: Count = Field(1, le=256)
    """Server nodes of each stage and slice; with `data_strategy: ps-sync`."""
    resources_per_server: Resources = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of one server node; by default none, since it works while workers wait."""
    replication: Count = Field(1, le=2)
    """2: each shard has a backup, which takes over if its server is lost."""
    wire: Literal["exact", "fp16", "bf16"] = "exact"
    """Dtype sent between workers and servers on different nodes; within a node memory is shared."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zb-h1"] = "1f1b"
    """Order in which a stage computes its micro-batches: docs/schedules.md."""
    micro_batches: Count | None = Field(None, le=4096)
    """Micro-batches of a replica's batch; None: the job's `gradient_accumulation` if it has one,
    else four for each stage, at most one per sample."""
    virtual: Count | None = Field(None, le=64)
    """Model chunks per stage; only for `interleaved`, where None is 2."""
    cut: str | tuple[str, ...] = "auto"
    """`auto`: by the layers' measured time; `even`: equal numbers of layers; or a list of the first
    layers of all pieces but the first."""
    memory_limit_mb: Positive | None = None
    """Limit for the estimated memory of a stage, in MiB; with `cut: auto`."""
    init: Literal["build", "meta"] = "build"
    """`meta`: no process ever holds the whole model; needs modules with `reset_parameters`."""
    recompute: Flag = False
    """Keep only a stage's input, and recompute its activations in backward; implied by the job's
    `activation_checkpointing`."""
    tensor_plan: dict[str, str] = Field(default_factory=dict)
    """How layers are sliced, by patterns of their names, such as "blocks.*.mlp.1": colwise."""
    backend: Backend = "auto"
    """Transport; `auto`: chosen by the placement of the workers, and logged."""
    timeout_s: Seconds = Field(60.0)
    """Deadline of one operation; the error names the missing ranks."""
    debug: Flag = False
    """Check that every operation matches on all ranks; by default only the first ones."""
    overlap: Flag = True
    """Reduce gradients over the replicas while the pipeline still drains."""
    bucket_mb: Positive = Field(8.0, le=1024)
    """Size of a gradient bucket in MiB; with `data` > 1."""
    trace_step: Count = 5
    """Step, from 1, that `pipeline_trace.json` records; the last step of shorter runs."""

    @property
    def grid(self) -> Grid:
        """Positions of all ranks."""
        return Grid(self.pipeline, self.tensor, self.data)

    @property
    def chunks(self) -> int:
        """Model chunks of a stage (`virtual`)."""
        return (self.virtual or 2) if self.schedule == "interleaved" else 1

    @property
    def virtual_stages(self) -> int:
        """Chunks of the whole model; virtual stages are their numbers along the model."""
        return self.pipeline * self.chunks

    def micro(self, job: Job) -> int:
        """Return the number of micro-batches of a replica's part of a full batch."""
        if self.micro_batches is not None:
            return self.micro_batches
        default = _PER_STAGE * self.pipeline if self.pipeline > 1 else 1
        count = max(1, min(default, job.global_batch_size // self.data))
        if self.schedule == "interleaved":
            count = max(self.pipeline, count // self.pipeline * self.pipeline)
        return count


def complete(options: Mapping[str, Any], workers: int) -> dict[str, Any]:
    """
    Choose the sizes that a job does not set, so that their product is the number of workers.

    Args:
        options: of the job, validated or not.
        workers: of the job.

    Returns:
        The options with all three sizes; unchanged if no choice of the missing ones fits.
    """
    sizes = {name: options[name] for name in ("pipeline", "tensor", "data") if name in options}
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        return dict(options)
    left, rest = divmod(workers, math.prod(sizes.values()))
    if rest or not left:
        return dict(options)
    sizes.setdefault("tensor", 1)
    if "pipeline" not in sizes:
        sizes["pipeline"] = left if "data" in sizes else _smallest_factor(left)
        left //= sizes["pipeline"]
    sizes.setdefault("data", left)
    return {**options, **sizes}


def _smallest_factor(number: int) -> int:
    """Return the smallest divisor above 1, or 1 for 1."""
    return next((n for n in range(2, number + 1) if number % n == 0), 1)


def problems(chosen: HybridOptions, job: Job) -> list[Problem]:
    """Return all problems; empty: the job can run."""
    return [
        *_sizes(chosen, job),
        *_micro_batches(chosen, job),
        *_cut(chosen),
        *_combinations(chosen, job),
        *_optimizer(chosen, job),
        *_without_effect(chosen),
    ]


def _sizes(chosen: HybridOptions, job: Job) -> list[Problem]:
    world, grid = job.scaling.world, chosen.grid
    if grid.world == world:
        return []
    text = (
        f"pipeline {chosen.pipeline} x tensor {chosen.tensor} x data {chosen.data} are "
        f"{grid.world} workers, scaling.num_workers is {job.scaling.num_workers}"
    )
    return [_problem("pipeline", text, f"set scaling.num_workers: {grid.world}, or other sizes")]


def _micro_batches(chosen: HybridOptions, job: Job) -> list[Problem]:
    problems = []
    if job.gradient_accumulation > 1:
        text = f"`hybrid` splits batches into `micro_batches` (got {job.gradient_accumulation})"
        problems.append(Problem(("gradient_accumulation",), text, "set only one of the two"))
    micro, batch = chosen.micro(job), job.global_batch_size
    if chosen.data <= batch < chosen.data * micro:
        text = f"{batch} samples cannot be cut into {chosen.data} replicas x {micro} micro-batches"
        problems.append(_problem("micro_batches", text, f"at most {batch // chosen.data}"))
    if chosen.schedule == "interleaved" and micro % chosen.pipeline:
        lower = micro // chosen.pipeline * chosen.pipeline
        near = f"{lower} or {lower + chosen.pipeline}" if lower else f"{chosen.pipeline}"
        text = f"interleaved needs a multiple of its {chosen.pipeline} stages (got {micro})"
        problems.append(_problem("micro_batches", text, f"use {near}, or `schedule: 1f1b`"))
    return problems


def _optimizer(chosen: HybridOptions, job: Job) -> list[Problem]:
    if chosen.tensor == 1 or not job.optimizer.whole:
        return []
    text = f"needs whole tensors, and `tensor: {chosen.tensor}` cuts them"
    return [Problem(("optimizer", "name"), text, "set it to 1, or use another optimizer")]


def _cut(chosen: HybridOptions) -> list[Problem]:
    if isinstance(chosen.cut, str):
        if chosen.cut in ("auto", "even"):
            return []
        near = hint(chosen.cut, ("auto", "even"))
        text = f"must be `auto`, `even` or a list of layers (got {chosen.cut!r})"
        return [_problem("cut", text, near)]
    problems = []
    if len(chosen.cut) != chosen.virtual_stages - 1:
        count = chosen.virtual_stages
        text = f"{count} pieces need the names of {count - 1} first layers"
        problems.append(
            _problem(
                "cut",
                f"{text} (got {len(chosen.cut)} names)",
                "name one for each piece but the first",
            )
        )
    if len({*chosen.cut}) < len(chosen.cut):
        problems.append(_problem("cut", "a layer is named twice", "name each once"))
    return problems


def _combinations(chosen: HybridOptions, job: Job) -> list[Problem]:
    problems = []
    if chosen.schedule == "interleaved" and chosen.virtual == 1:
        text = "interleaved needs 2 or more pieces per stage (got 1)"
        problems.append(_problem("virtual", text, "use 2, or `schedule: 1f1b`, which has one"))
    checkpoints = job.activation_checkpointing is not None
    if chosen.recompute and chosen.schedule == "zb-h1":
        where = ("activation_checkpointing",) if checkpoints else ("strategy", "recompute")
        text = "cannot be combined with `schedule: zb-h1`, which would compute forward three times"
        problems.append(Problem(where, text, "use `schedule: 1f1b`"))
    if checkpoints and not chosen.recompute:
        text = "is false, but `activation_checkpointing` requires it"
        problems.append(_problem("recompute", text, "remove one of the two"))
    if job.precision == "fp16" and chosen.wire != "exact":
        text = "fp16 cannot be combined with `wire`"
        problems.append(Problem(("precision",), text, "remove it, or use bf16"))
    if job.embeddings is not None:
        text = "cannot be combined with `hybrid`: rows are looked up by whole models only"
        problems.append(Problem(("embeddings",), text, "use `ring` or a parameter server"))
    if job.checkpoint.trained_only and chosen.tensor > 1:
        text = f"identifies base tensors as a whole, and `tensor: {chosen.tensor}` cuts them"
        problems.append(Problem(("checkpoint", "trained_only"), text, "remove one of the two"))
    if job.compile is not None and chosen.grid.group_size > 1:
        text = "cannot be combined with stages, whose layers are called one by one, nor with slices"
        problems.append(Problem(("compile",), text, "remove it, or use `ring`"))
    if chosen.backend == "nccl" and not job.scaling.use_gpu:
        hint_ = "set scaling.use_gpu: true, or `backend: auto`"
        problems.append(_problem("backend", "`nccl` runs between GPUs only", hint_))
    if chosen.tensor > 1 and not chosen.tensor_plan:
        text = f"tensor: {chosen.tensor} needs it, to know which layers to slice"
        problems.append(_problem("tensor_plan", text, 'such as {"blocks.*.mlp.1": colwise}'))
    return [*problems, *check_styles(chosen.tensor_plan, ("strategy", "tensor_plan"))]


def _without_effect(chosen: HybridOptions) -> list[Problem]:
    ring = chosen.data_strategy == "ring"
    servers = (ring, "with `data_strategy: ps-sync`")
    buckets = (chosen.data == 1 or not ring, "with `data` > 1 and `data_strategy: ring`")
    unused = {
        "virtual": (chosen.schedule != "interleaved", "with `schedule: interleaved`"),
        "schedule": (chosen.pipeline == 1, "with `pipeline` > 1"),
        "cut": (chosen.virtual_stages == 1, "with `pipeline` > 1"),
        "trace_step": (chosen.pipeline == 1, "with `pipeline` > 1"),
        "memory_limit_mb": (chosen.cut != "auto" or chosen.virtual_stages == 1, "with `cut: auto`"),
        "tensor_plan": (chosen.tensor == 1, "with `tensor` > 1"),
        "overlap": buckets,
        "bucket_mb": buckets,
        "num_servers": servers,
        "resources_per_server": servers,
        "replication": servers,
        "wire": servers,
    }
    return [
        _problem(option, f"has an effect only {condition}", "remove it")
        for option, (is_unused, condition) in unused.items()
        if is_unused and option in chosen.model_fields_set
    ]


def _problem(option: str, message: str, hint_: str) -> Problem:
    return Problem(("strategy", option), message, hint_)
