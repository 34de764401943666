"""What the options of `hybrid` cannot be together, and with the rest of the job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distplat.platform.errors import Problem
from distplat.platform.spec import Job
from distplat.platform.suggest import hint
from distplat.strategies.tensor.plan import check_styles

if TYPE_CHECKING:
    from distplat.strategies.hybrid import HybridOptions


def problems(chosen: HybridOptions, job: Job) -> list[Problem]:
    """List all that is wrong; empty: the job can run."""
    return [
        *_sizes(chosen, job),
        *_micro_batches(chosen, job),
        *_cut(chosen),
        *_combinations(chosen, job),
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
    found = []
    if job.gradient_accumulation > 1:
        text = f"`hybrid` cuts batches itself (got {job.gradient_accumulation})"
        found.append(Problem(("gradient_accumulation",), text, "set strategy.micro_batches"))
    micro, batch = chosen.micro(job), job.global_batch_size
    if batch < chosen.data * micro:
        text = f"{batch} samples cannot be cut into {chosen.data} replicas x {micro} micro-batches"
        found.append(_problem("micro_batches", text, f"at most {batch // chosen.data}"))
    if chosen.schedule == "interleaved" and micro % chosen.pipeline:
        lower = micro // chosen.pipeline * chosen.pipeline
        near = f"{lower} or {lower + chosen.pipeline}" if lower else f"{chosen.pipeline}"
        text = f"interleaved needs a multiple of its {chosen.pipeline} stages (got {micro})"
        found.append(_problem("micro_batches", text, f"take {near}, or `schedule: 1f1b`"))
    return found


def _cut(chosen: HybridOptions) -> list[Problem]:
    if isinstance(chosen.cut, str):
        if chosen.cut in ("auto", "even"):
            return []
        near = hint(chosen.cut, ("auto", "even"))
        text = f"must be `auto`, `even` or a list of layers (got {chosen.cut!r})"
        return [_problem("cut", text, near)]
    found = []
    if len(chosen.cut) != chosen.places - 1:
        text = f"{chosen.places} pieces begin with {chosen.places - 1} layers besides the first"
        found.append(_problem("cut", f"{text} (got {len(chosen.cut)} names)", "name as many"))
    if len({*chosen.cut}) < len(chosen.cut):
        found.append(_problem("cut", "a layer is named twice", "name each once"))
    return found


def _combinations(chosen: HybridOptions, job: Job) -> list[Problem]:
    found = []
    if chosen.schedule == "interleaved" and chosen.virtual == 1:
        text = "interleaved needs 2 or more pieces per stage (got 1)"
        found.append(_problem("virtual", text, "take 2, or `schedule: 1f1b`, which has one"))
    if chosen.recompute and chosen.schedule == "zb-h1":
        text = "cannot be combined with `schedule: zb-h1`, which would compute forward three times"
        found.append(_problem("recompute", text, "take `schedule: 1f1b`"))
    if job.embeddings is not None:
        text = "cannot be combined with `hybrid`: rows are looked up by whole models only"
        found.append(Problem(("embeddings",), text, "take `ring` or a parameter server"))
    if chosen.backend == "nccl" and not job.scaling.use_gpu:
        hint_ = "set scaling.use_gpu: true, or `backend: auto`"
        found.append(_problem("backend", "`nccl` runs between GPUs only", hint_))
    if chosen.tensor > 1 and not chosen.tensor_plan:
        text = f"tensor: {chosen.tensor} needs it: nothing says which layers are sliced"
        found.append(_problem("tensor_plan", text, 'such as {"blocks.*.mlp.1": colwise}'))
    return [*found, *check_styles(chosen.tensor_plan, ("strategy", "tensor_plan"))]


def _without_effect(chosen: HybridOptions) -> list[Problem]:
    ring = chosen.data_strategy == "ring"
    servers = (ring, "with `data_strategy: ps-sync`")
    buckets = (chosen.data == 1 or not ring, "with `data` > 1 and `data_strategy: ring`")
    idle = {
        "virtual": (chosen.schedule != "interleaved", "with `schedule: interleaved`"),
        "schedule": (chosen.pipeline == 1, "with `pipeline` > 1"),
        "cut": (chosen.places == 1, "with `pipeline` > 1"),
        "trace_step": (chosen.pipeline == 1, "with `pipeline` > 1"),
        "memory_limit_mb": (chosen.cut != "auto" or chosen.places == 1, "with `cut: auto`"),
        "tensor_plan": (chosen.tensor == 1, "with `tensor` > 1"),
        "overlap": buckets,
        "bucket_mb": buckets,
        "num_servers": servers,
        "resources_per_server": servers,
        "replication": servers,
        "wire": servers,
    }
    return [
        _problem(option, f"has an effect only {when}", "remove it")
        for option, (is_idle, when) in idle.items()
        if is_idle and option in chosen.model_fields_set
    ]


def _problem(option: str, message: str, hint_: str) -> Problem:
    return Problem(("strategy", option), message, hint_)
