"""Where a model is cut into stages, agreed between the ranks, and what of it a rank holds."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError, hint
from distplat.platform.even_split import split_evenly
from distplat.platform.spec import Job
from distplat.platform.topology import Position
from distplat.strategies.algorithms.partition import bounds, partition
from distplat.strategies.collective import Collective, broadcast_value, gather_values
from distplat.strategies.loop.batches import batches_by, one_batch
from distplat.strategies.loop.collate import moved
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.model.block_layers import Order
from distplat.strategies.model.layers import Layer, tracing
from distplat.strategies.model.meta import materialise
from distplat.strategies.model.model_call import ModelCall
from distplat.strategies.model.sync_batch_norm import refuse_sync_batch_norm
from distplat.strategies.pipeline.call_order import agreed_order, has_order, order_of
from distplat.strategies.pipeline.executor import training_plan
from distplat.strategies.pipeline.hybrid_options import HybridOptions
from distplat.strategies.pipeline.limits import (
    SAMPLES,
    BeforeSlicing,
    as_pair,
    compare,
    entering,
    inputs_of,
    names_of,
    shared,
)
from distplat.strategies.pipeline.rank_model import ModelPart, layers_for, take_part, take_whole
from distplat.strategies.pipeline.values import copied, tensors_in
from distplat.strategies.tensor.parallel_plan import resolve
from distplat.strategies.tensor.parallelize import parallelize
from distplat.strategies.torch_compat import tree_map


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one micro-batch."""

    name: str
    forward_s: float
    backward_s: float
    parameter_bytes: int
    """With buffers; a tensor that the layer uses twice counts once."""
    activation_bytes: int
    """Kept from forward to backward, parameters apart."""
    output_bytes: int
    """What crosses a cut behind this layer, in each direction."""


def measured(layer: Layer, inputs: Any, repeats: int) -> tuple[LayerCost, Any]:
    """
    Measure a layer on one micro-batch; it and torch's generators stay as they were.

    Args:
        layer: with values (not on `meta`).
        inputs: of a micro-batch's shapes; a tree of tensors, with one tensor at least.
        repeats: medians are of so many, >= 1, after one that does not count.

    Returns:
        Its cost, and its outputs for the next layer.

    Raises:
        SpecError: it cannot be copied.
    """
    devices = sorted({one.device.index for one in tensors_in(inputs) if one.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return _measured(layer, tree_map(_leaf, inputs), repeats)


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.is_floating_point())


def _measured(layer: Layer, inputs: Any, repeats: int) -> tuple[LayerCost, Any]:
    module = _copy(layer)  # gradients and running statistics are not to change
    module.train()  # as in a step: a layer may have its own idea of it, such as a frozen batch norm
    kept = _Kept(module)
    given = copied(inputs)  # the layer may work in place; each time on the same values
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved):
        outputs = module(given)
    gradients = [torch.ones_like(one) for one in tensors_in(outputs) if one.requires_grad]
    like = tensors_in(inputs)[0]
    forwards, backwards = [], []
    for _ in range(repeats + 1):
        given = copied(inputs)
        wait(like)
        start = time.perf_counter()
        made = [one for one in tensors_in(module(given)) if one.requires_grad]
        wait(like)
        middle = time.perf_counter()
        if made:
            torch.autograd.backward(made, gradients)
        wait(like)
        forwards.append(middle - start)
        backwards.append(time.perf_counter() - middle)
    own = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
    cost = LayerCost(
        layer.name,
        median(forwards[1:]),
        median(backwards[1:]),
        sum(own.values()),
        kept.bytes,
        sum(one.nbytes for one in tensors_in(outputs)),
    )
    return cost, outputs


def _copy(layer: Layer) -> nn.Module:
    try:
        return copy.deepcopy(layer.module)
    except Exception as error:
        text = f"layer {layer.name} cannot be copied, to be measured: {error}"
        hint = "set `cut: even`, or name the layers to cut before"
        raise SpecError(Problem(("strategy", "cut"), text, hint)) from error


def wait(like: Tensor) -> None:
    """Return when the tensor's device has done what it was asked to."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


class _Kept:
    """Adds up the memory that autograd keeps for backward, each storage once."""

    def __init__(self, module: nn.Module) -> None:
        own = (*module.parameters(), *module.buffers())
        self._seen = {t.untyped_storage().data_ptr() for t in own}
        self._alive: list[Tensor] = []  #: or another storage could come to lie at the same address
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is kept."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(tensor.detach())
            self.bytes += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class Memory:
    """What stages may hold; what they need is estimated from the layers' costs."""

    limit_bytes: Sequence[int]
    """Of each stage."""
    live: Sequence[int]
    """Micro-batches that each stage holds at once: the schedule's `peak_activations`."""
    copies: float = 4.0
    """Of the parameters: values, gradients and two moments of Adam's."""
    recompute: bool = False
    """Stages keep their inputs only, and activations of the one micro-batch in backward."""

    def needed(self, costs: Sequence[LayerCost], k: int, start: int, stop: int) -> float:
        """Give the bytes that stage `k` needs with the layers start..stop-1."""
        some = costs[start:stop]
        parameters = self.copies * sum(cost.parameter_bytes for cost in some)
        activations = sum(cost.activation_bytes for cost in some)
        if not self.recompute:
            return parameters + self.live[k] * activations
        entering = costs[start - 1].output_bytes if start else 0
        return parameters + self.live[k] * entering + activations


def cut(
    costs: Sequence[LayerCost],
    parts: int,
    memory: Memory | None = None,
    trained: Sequence[bool] | None = None,
) -> list[int]:
    """
    Choose cut points so that the slowest stage is as quick as can be.

    Args:
        costs: of the layers.
        parts: stages.
        memory: what they may hold; None: anything.
        trained: of each layer, whether it has something to train, as each stage must; None: all.

    Returns:
        The numbers of the layers with which the stages 1, 2, ... begin.

    Raises:
        ValueError: there are fewer layers than stages, or no cut fits into the memory.
    """
    if memory is not None and not len(memory.limit_bytes) == len(memory.live) == parts:
        raise ValueError(f"limits and live micro-batches must be given for each of {parts} stages")

    def fits(k: int, start: int, stop: int) -> bool:
        if trained is not None and not any(trained[start:stop]):
            return False
        return memory is None or memory.needed(costs, k, start, stop) <= memory.limit_bytes[k]

    return partition([cost.forward_s + cost.backward_s for cost in costs], parts, fits)


def points_before(layers: Sequence[Layer], names: Sequence[str]) -> list[int]:
    """
    Turn names into cut points: a stage begins with each layer named.

    Raises:
        SpecError: there is no such layer, or a stage would be empty.
    """
    places = {layer.name: number for number, layer in enumerate(layers)}
    unknown = [name for name in names if name not in places]
    if unknown:
        message = f"there is no layer {unknown[0]!r} to cut before"
        raise _problem("cut", message, hint(unknown[0], [*places][1:]))
    points = [places[name] for name in names]
    try:
        bounds(points, len(layers))
    except ValueError as error:
        raise _problem("cut", str(error), "") from error
    return points


logger = logging.getLogger(__name__)
_REPEATS = 5


@dataclass(frozen=True)
class CutRequest:
    """How the job wants its model cut."""

    places: int
    """Pieces, in the order of the model."""
    cut: str | Sequence[str]
    """`auto`, `even`, or the names of the layers with which pieces begin."""
    memory: Memory | None = None
    """What pieces may hold; with `auto`."""
    meta_seed: int | None = None
    """Of the job, where layers have no values yet."""


def agree_on_points(
    layers: Sequence[Layer],
    request: CutRequest,
    known: list[int] | None,
    inputs: Callable[[], Any],
    group: Collective,
    device: torch.device,
) -> list[int]:
    """
    Give the cut points, the same on all ranks.

    Args:
        layers: of the model.
        request: of the job.
        known: what this rank has found in an attempt before.
        inputs: gives a micro-batch to measure with, on `device`; called on rank 0 only.
        group: all ranks; each calls this.
        device: where layers are, or will be.

    Raises:
        SpecError: the model cannot be cut so.
        CollectiveError: a rank is missing.
    """
    if known is None and len(layers) < request.places:
        text = f"the model has {len(layers)} layers, too few for {request.places} places"
        hint = "take fewer stages (1 cuts nothing), or have the task's `stages` say more"
        raise _problem("pipeline", text, hint)
    if request.places == 1:
        return []
    if request.cut != "auto" and known is not None:
        return known
    if request.cut == "even":
        return [start for start, _ in split_evenly(len(layers), request.places)[1:]]
    if not isinstance(request.cut, str):
        return points_before(layers, request.cut)
    found = [points for points in gather_values(known, group, device) if points]
    if found:
        return list(found[0])
    costs = _measure(layers, inputs, request.meta_seed, group, device)
    points = _cut(layers, costs, request)
    if group.rank == 0:
        logger.info("the model is cut before %s", ", ".join(layers[p].name for p in points))
    return points


def _measure(
    layers: Sequence[Layer],
    inputs: Callable[[], Any],
    meta_seed: int | None,
    group: Collective,
    device: torch.device,
) -> list[LayerCost]:
    here = group.rank == 0
    values = inputs() if here else None
    costs = []
    for number, layer in enumerate(layers):
        told = {}
        if values is not None:
            one = layer if meta_seed is None else _filled(layer, number, meta_seed, device)
            cost, values = measured(one, values, _REPEATS)
            told = asdict(cost)
        costs.append(LayerCost(**broadcast_value(told, 0, group, device)))
    return costs


def _filled(layer: Layer, number: int, seed: int, device: torch.device) -> Layer:
    """Give a copy of a layer on `meta`, with values: no more than one layer is there at once."""
    one = replace(layer, module=copy.deepcopy(layer.module))
    materialise([one], number, seed, str(device))
    return one


def _cut(layers: Sequence[Layer], costs: Sequence[LayerCost], request: CutRequest) -> list[int]:
    trained = [any(p.requires_grad for p in layer.module.parameters()) for layer in layers]
    if sum(trained) < request.places:
        names = ", ".join(one.name for one, there in zip(layers, trained, strict=True) if there)
        text = f"each of {request.places} stages needs something to train, and only {names} has it"
        raise _problem("pipeline", text, "take fewer stages (1 cuts nothing), or freeze less")

    try:
        return cut(costs, request.places, request.memory, trained)
    except ValueError as error:
        raise _problem("cut", str(error), "raise `memory_limit_mb`, or name the cut") from None


def _problem(field: str, message: str, hint: str) -> SpecError:
    return SpecError(Problem(("strategy", field), message, hint))


def agreed_part(
    options: HybridOptions,
    prepared: Prepared,
    at: Position,
    everybody: Collective,
    slices: Collective | None,
    known: ModelPart | None,
) -> ModelPart:
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
    order = _agreed_order(options, prepared, known, everybody)
    tries = slices is not None and _all_new(known is None, slices, prepared.device)
    together, part = slices if tries else None, known
    if part is None:
        assert prepared.model is not None, "a model that was built and not yet cut"
        names = names_of(prepared.model)
        part, inputs = _taken(options, prepared, prepared.model, order, at, everybody, together)
        part.names, part.order = names, order
        prepared.model = None
        if slices is not None:
            if together is not None:
                part.trial = BeforeSlicing(part.chunks, inputs)
            part.specs = parallelize(part.module, options.tensor_plan, slices, partial=True)
        part.finish(prepared.job.optimizer.group_of)
    elif options.places > 1:
        _agree(options, prepared, [], part.points, everybody)
    return part


def _agreed_order(
    options: HybridOptions, prepared: Prepared, known: ModelPart | None, everybody: Collective
) -> Order | None:
    """Have the order in which a model with blocks calls its parts; None: it is known without."""
    model, tried = prepared.model, None
    there = known.order is not None if known else has_order(prepared.task, model)
    if options.places == 1 or not there:
        return None
    if model is not None and options.init == "build":
        samples = partial(_samples, options, prepared)
        tried = partial(order_of, model, ModelCall(prepared.task), samples)
    device = torch.device(prepared.device)
    return agreed_order(tried, known.order if known else None, everybody, device)


def _all_new(new: bool, slices: Collective, device: str) -> bool:
    """Whether no rank of the slices was here in an attempt before: all can try them together."""
    old = torch.tensor([int(not new)], device=device)
    slices.all_reduce(old)
    return not int(old)


def _taken(
    options: HybridOptions,
    prepared: Prepared,
    model: nn.Module,
    order: Order | None,
    at: Position,
    everybody: Collective,
    together: Collective | None,
) -> tuple[ModelPart, dict[int, Any]]:
    """
    Give the part, and a few samples as they enter its places, to try it.

    Args:
        options: see `agreed_part`.
        prepared: the data.
        model: whole.
        order: of its parts; None: nobody has asked.
        at: this rank.
        everybody: all ranks.
        together: the slices, if they are to try it; else there are no samples.
    """
    task = prepared.task
    why = "which `hybrid` does not compute over its replicas"
    refuse_sync_batch_norm(model, why, "use nn.BatchNorm, or `strategy: ring`")
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
    layers = layers_for(task, model, order)
    if everybody.rank == 0 and seed is None:
        with tracing:
            samples = partial(_samples, options, prepared)
            compare(model, layers, lambda: entering(samples()), ModelCall(task))
    points = _agree(options, prepared, layers, None, everybody)
    mine = range(at.stage, options.places, options.pipeline)
    inputs = {}
    if tried is not None:
        some = shared(entering(_samples(options, prepared)), tried)
        with tracing:
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
        _cut_request(options, prepared.job),
        known,
        lambda: entering(_samples(options, prepared, None)),
        everybody,
        torch.device(prepared.device),
    )


def _cut_request(options: HybridOptions, job: Job) -> CutRequest:
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
    return as_pair(prepared.task, moved(batch, torch.device(prepared.device)))[0]
