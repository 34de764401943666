"""How a rank comes to its part: layers, where they are cut, and what of them is its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distplat.platform.grid import Position
from distplat.platform.spec import Job
from distplat.strategies.base import Collective
from distplat.strategies.pipeline.cutting import Wish, agree_on_points
from distplat.strategies.pipeline.limits import compare, entering, names_of, refuse
from distplat.strategies.pipeline.part import Part, layers_for, take_part, take_whole
from distplat.strategies.pipeline.plans import training_plan
from distplat.strategies.tensor.parallelize import parallelize
from distplat.strategies.tensor.plan import resolve
from distplat.strategies.training.batches import one_batch
from distplat.strategies.training.cut import Memory
from distplat.strategies.training.device import to_device
from distplat.strategies.training.session import Prepared
from distplat.strategies.training.stages import Layer

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
    if known is None:
        assert prepared.model is not None, "a model that was built and not yet cut"
        names = names_of(prepared.model)
        part = _taken(options, prepared, prepared.model, at, everybody)
        part.names = names
        prepared.model = None
        if slices is not None:
            part.specs = parallelize(part.module, options.tensor_plan, slices, partial=True)
        part.finish()
        return part
    if options.places > 1:
        _agree(options, prepared, [], known.points, everybody)
    return known


def _taken(
    options: HybridOptions,
    prepared: Prepared,
    model: nn.Module,
    at: Position,
    everybody: Collective,
) -> Part:
    task = prepared.task
    refuse(model)
    resolve(options.tensor_plan, [name for name, _ in model.named_modules()])
    seed = prepared.job.seed if options.init == "meta" else None
    if options.places == 1:
        return take_whole(
            task, model, recompute=options.recompute, seed=seed, device=prepared.device
        )
    layers = layers_for(task, model)
    if everybody.rank == 0 and seed is None:
        compare(model, layers, lambda: _first_inputs(options, prepared, most=1))
    points = _agree(options, prepared, layers, None, everybody)
    mine = range(at.stage, options.places, options.pipeline)
    return take_part(
        layers,
        points,
        mine,
        recompute=options.recompute,
        seed=seed,
        device=prepared.device,
    )


def _agree(
    options: HybridOptions,
    prepared: Prepared,
    layers: list[Layer],
    known: list[int] | None,
    everybody: Collective,
) -> list[int]:
    return agree_on_points(
        layers,
        _wish(options, prepared.job),
        known,
        lambda: _first_inputs(options, prepared),
        everybody,
        torch.device(prepared.device),
    )


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


def _first_inputs(options: HybridOptions, prepared: Prepared, most: int | None = None) -> Tensor:
    """
    Give the first micro-batch of the run, or its first samples, to try layers with.

    Raises:
        SpecError: it is not one tensor.
    """
    ids = prepared.sampler.micro_batches(0, 0, options.micro(prepared.job))[0][:most]
    device = torch.device(prepared.device)
    inputs, _ = to_device(one_batch(prepared.data, ids.tolist()), device)
    return entering(inputs)
