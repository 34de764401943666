"""How a rank comes to its part: layers, where they are cut, and what of them is its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distplat.platform.grid import Position
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective
from distplat.strategies.pipeline.cutting import CutRequest, agree_on_points
from distplat.strategies.pipeline.limits import entering, names_of, refuse
from distplat.strategies.pipeline.options import HybridOptions
from distplat.strategies.pipeline.part import Part, layers_for, take_part, take_whole
from distplat.strategies.pipeline.plans import training_plan
from distplat.strategies.pipeline.trial import SAMPLES, BeforeSlicing, compare, inputs_of, shared
from distplat.strategies.tensor.parallelize import parallelize
from distplat.strategies.tensor.plan import resolve
from distplat.strategies.training.batches import batches_by, one_batch
from distplat.strategies.training.cut import Memory
from distplat.strategies.training.device import to_device
from distplat.strategies.training.prepared import Prepared
from distplat.strategies.training.stages import Layer


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
    new = known is None
    together = slices if slices is not None and _all_new(new, slices, prepared.device) else None
    part = known
    if part is None:
        assert prepared.model is not None, "a model that was built and not yet cut"
        names = names_of(prepared.model)
        part, inputs = _taken(options, prepared, prepared.model, at, everybody, together)
        part.names = names
        prepared.model = None
        if slices is not None:
            if together is not None:
                part.trial = BeforeSlicing(part.chunks, inputs)
            part.specs = parallelize(part.module, options.tensor_plan, slices, partial=True)
        part.finish()
    elif options.places > 1:
        _agree(options, prepared, [], part.points, everybody)
    return part


def _all_new(new: bool, slices: Collective, device: str) -> bool:
    """Whether no rank of the slices was here in an attempt before: all can try them together."""
    old = torch.tensor([int(not new)], device=device)
    slices.all_reduce(old)
    return not int(old)


def _taken(
    options: HybridOptions,
    prepared: Prepared,
    model: nn.Module,
    at: Position,
    everybody: Collective,
    together: Collective | None,
) -> tuple[Part, dict[int, Any]]:
    """
    Give the part, and a few samples as they enter its places, to try it.

    Args:
        options: see `agreed_part`.
        prepared: the data.
        model: whole.
        at: this rank.
        everybody: all ranks.
        together: the slices, if they are to try it; else there are no samples.
    """
    task = prepared.task
    refuse(model)
    resolve(options.tensor_plan, [name for name, _ in model.named_modules()])
    seed = prepared.job.seed if options.init == "meta" else None
    tried = together if seed is None else None
    fields: dict[str, Any] = {
        "recompute": options.recompute,
        "seed": seed,
        "device": prepared.device,
    }
    if options.places == 1:
        one = take_whole(task, model, **fields)
        return one, {} if tried is None else {0: shared(_samples(options, prepared), tried)}
    layers = layers_for(task, model)
    if everybody.rank == 0 and seed is None:
        compare(model, layers, lambda: entering(_samples(options, prepared)))
    points = _agree(options, prepared, layers, None, everybody)
    mine = range(at.stage, options.places, options.pipeline)
    inputs = {}
    if tried is not None:
        some = shared(entering(_samples(options, prepared)), tried)
        inputs = inputs_of(layers, {place: [0, *points][place] for place in mine}, some)
    return take_part(layers, points, mine, **fields), inputs


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
        lambda: entering(_samples(options, prepared, None)),
        everybody,
        torch.device(prepared.device),
    )


def _wish(options: HybridOptions, job: Job) -> CutRequest:
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
    return CutRequest(
        options.places, options.cut, memory, job.seed if options.init == "meta" else None
    )


def _samples(options: HybridOptions, prepared: Prepared, most: int | None = SAMPLES) -> Any:
    """Give inputs of the run's first samples, or with None of its first micro-batch."""
    ids = prepared.sampler.micro_batches(0, 0, options.micro(prepared.job))[0][:most]
    batch = one_batch(batches_by(prepared.task, prepared.data), ids.tolist())
    inputs, _ = to_device(batch, torch.device(prepared.device))
    return inputs
