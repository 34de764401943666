"""How a rank comes to its part: layers, where they are cut, and what of them is its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distplat.platform.grid import Position
from distplat.platform.spec import Job
from distplat.strategies.base import Collective
from distplat.strategies.pipeline.cutting import Wish, agree_on_points
from distplat.strategies.pipeline.part import Part, layers_for, take_part
from distplat.strategies.pipeline.plans import training_plan
from distplat.strategies.tensor.parallelize import parallelize
from distplat.strategies.tensor.plan import resolve
from distplat.strategies.training.batches import one_batch
from distplat.strategies.training.cut import Memory
from distplat.strategies.training.device import to_device
from distplat.strategies.training.session import Prepared

if TYPE_CHECKING:
    from distplat.strategies.hybrid import HybridOptions


def agreed_part(
    options: HybridOptions,
    prepared: Prepared,
    at: Position,
    everybody: Collective,
    slices: Collective | None,
    known: Part | None,
) -> Part:
    """
    Give what a rank holds; the rest of the model may go.

    Args:
        options: of the strategy.
        prepared: the whole model, and data to measure with.
        at: this rank.
        everybody: all ranks; each calls this.
        slices: the ranks that share this one's layers; None: it has them for itself.
        known: what it holds since an attempt before; then it tells new ranks where the cuts are.

    Raises:
        SpecError: the model cannot be cut, or sliced, as the job says.
        CollectiveError: a rank is missing.
    """
    device = torch.device(prepared.device)
    model, layers = prepared.model, []
    if known is None:
        assert model is not None, "a model that was built and not yet cut"
        layers = layers_for(prepared.task, model)
        resolve(options.tensor_plan, [name for name, _ in model.named_modules()])
    points = agree_on_points(
        layers,
        _wish(options, prepared.job),
        None if known is None else known.points,
        lambda: _first_inputs(options, prepared),
        everybody,
        device,
    )
    if known is not None:
        return known
    part = take_part(
        layers,
        points,
        range(at.stage, options.places, options.pipeline),
        recompute=options.recompute,
        seed=prepared.job.seed if options.init == "meta" else None,
        device=prepared.device,
    )
    prepared.model = None
    if slices is not None:
        part.specs = parallelize(part.module, options.tensor_plan, slices, partial=True)
    part.finish()
    return part


def _wish(options: HybridOptions, job: Job) -> Wish:
    memory = None
    if options.memory_limit_mb is not None:
        schedule = training_plan(
            options.schedule, options.pipeline, options.micro(job), options.chunks
        ).schedule
        limit = int(options.memory_limit_mb * 2**20 / options.chunks)
        live = [-(-one // options.chunks) for one in schedule.peak_activations()]
        memory = Memory(
            [limit] * options.places, live * options.chunks, recompute=options.recompute
        )
    return Wish(options.places, options.cut, memory, job.seed if options.init == "meta" else None)


def _first_inputs(options: HybridOptions, prepared: Prepared) -> Tensor:
    """Give the first micro-batch of the run, to measure layers with."""
    ids = prepared.sampler.micro_batches(0, 0, options.micro(prepared.job))[0]
    device = torch.device(prepared.device)
    inputs, _ = to_device(one_batch(prepared.data, ids.tolist()), device)
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"a pipeline takes one tensor as inputs, train_data gives {type(inputs).__name__}"
        )
    return inputs
