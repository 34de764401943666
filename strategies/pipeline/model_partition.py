"""Where a model is cut into stages, agreed between the ranks, and what of it a rank holds."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError, hint
from distplat.platform.even_split import split_evenly
from distplat.platform.topology import Position
from distplat.strategies.algorithms.partition import bounds, partition
from distplat.strategies.collective import Collective, broadcast_value, gather_values
from distplat.strategies.loop.batches import collate_of, one_batch
from distplat.strategies.loop.collate import to_device
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.model.block_layers import CallOrder
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.layers import Layer, tracing
from distplat.strategies.model.meta import materialise
from distplat.strategies.model.model_call import ModelCall
from distplat.strategies.model.module_options import checkpointed_modules, compile_calls
from distplat.strategies.model.sync_batch_norm import refuse_sync_batch_norm
from distplat.strategies.model.trials import untouched
from distplat.strategies.pipeline.call_order import agreed_order, call_order_of, has_order
from distplat.strategies.pipeline.executor import training_plan
from distplat.strategies.pipeline.hybrid_options import HybridOptions
from distplat.strategies.pipeline.layer_check import check_layers
from distplat.strategies.pipeline.limits import as_pair, check_inputs, names_of
from distplat.strategies.pipeline.rank_model import ModelPart, layers_for, take_part, take_whole
from distplat.strategies.pipeline.slicing_trial import SlicingTrial
from distplat.strategies.pipeline.values import copied, on_device, tensor_leaves
from distplat.strategies.tensor.parallel_plan import resolve
from distplat.strategies.tensor.parallelize import parallelize
from distplat.strategies.torch_compat import tree_map

_SAMPLES = 2
"""That layers are tried with: one alone might lose its dimension in a `squeeze`."""


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


def measure_layer(layer: Layer, inputs: Any, repeats: int) -> tuple[LayerCost, Any]:
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
    devices = sorted({one.device.index for one in tensor_leaves(inputs) if one.is_cuda})
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
    gradients = [torch.ones_like(one) for one in tensor_leaves(outputs) if one.requires_grad]
    like = tensor_leaves(inputs)[0]
    forwards, backwards = [], []
    for _ in range(repeats + 1):
        given = copied(inputs)
        wait(like)
        start = time.perf_counter()
        differentiable = [one for one in tensor_leaves(module(given)) if one.requires_grad]
        wait(like)
        middle = time.perf_counter()
        if differentiable:
            torch.autograd.backward(differentiable, gradients)
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
        sum(one.nbytes for one in tensor_leaves(outputs)),
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
    numbers = {layer.name: number for number, layer in enumerate(layers)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        message = f"there is no layer {unknown[0]!r} to cut before"
        raise _problem("cut", message, hint(unknown[0], [*numbers][1:]))
    points = [numbers[name] for name in names]
    try:
        bounds(points, len(layers))
    except ValueError as error:
        raise _problem("cut", str(error), "") from error
    return points


logger = logging.getLogger(__name__)
_REPEATS = 5


def _filled(layer: Layer, number: int, seed: int, device: torch.device) -> Layer:
    """Give a copy of a layer on `meta`, with values: no more than one layer is there at once."""
    one = replace(layer, module=copy.deepcopy(layer.module))
    materialise([one], number, seed, str(device))
    return one


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
    cutting = _Partitioner(options, prepared, everybody)
    order = cutting.order(known)
    tries = slices is not None and _all_new(known is None, slices, prepared.device)
    together, part = slices if tries else None, known
    if part is None:
        assert prepared.model is not None, "a model that was built and not yet cut"
        names = names_of(prepared.model)
        part, inputs = cutting.make_part(prepared.model, order, at, together)
        part.names, part.order = names, order
        prepared.model = None
        if slices is not None:
            if together is not None:
                here = [name for name, _ in part.module.named_modules()]
                planned = resolve(options.tensor_plan, here, partial=True)
                part.trial = SlicingTrial(part.module, part.chunks, inputs, planned)
            part.specs = parallelize(part.module, options.tensor_plan, slices, partial=True)
        part.flat = FlatModel(part.module, group_of=prepared.job.optimizer.group_of)
    elif options.virtual_stages > 1:
        cutting.points([], part.points)
    return part


def _all_new(new: bool, slices: Collective, device: str) -> bool:
    """Whether no rank of the slices was here in an attempt before: all can try them together."""
    old = torch.tensor([int(not new)], device=device)
    slices.all_reduce(old)
    return not int(old)


class _Partitioner:
    """
    How a rank comes to its part of the model; every rank makes the same calls.

    Args:
        options: see `agreed_part`.
        prepared: see there.
        group: all ranks.
    """

    def __init__(self, options: HybridOptions, prepared: Prepared, group: Collective) -> None:
        self._options, self._prepared, self._group = options, prepared, group
        self._device = torch.device(prepared.device)
        self._seed = prepared.job.seed if options.init == "meta" else None

    def order(self, known: ModelPart | None) -> CallOrder | None:
        """Have the order in which a model with blocks calls its parts; None: none is needed."""
        p, tried = self._prepared, None
        there = known.order is not None if known else has_order(p.task, p.model)
        if self._options.virtual_stages == 1 or not there:
            return None
        if p.model is not None and self._seed is None:
            tried = partial(call_order_of, p.model, ModelCall(p.task), self._samples)
        return agreed_order(tried, known.order if known else None, self._group, self._device)

    def make_part(
        self, model: nn.Module, order: CallOrder | None, at: Position, together: Collective | None
    ) -> tuple[ModelPart, dict[int, Any]]:
        """
        Give the part, and a few samples as they enter its virtual stages, to try it.

        Args:
            model: whole.
            order: of its parts; None: nobody has asked.
            at: this rank.
            together: the slices, if they are to try it; else there are no samples.
        """
        options, task, seed = self._options, self._prepared.task, self._seed
        why = "which `hybrid` does not compute over its replicas"
        refuse_sync_batch_norm(model, why, "use nn.BatchNorm, or `strategy: ring`")
        resolve(options.tensor_plan, [name for name, _ in model.named_modules()])
        checkpointed_modules(self._prepared.job, model)  # for its errors: whole stages are
        tried = together if seed is None else None
        recompute, device = options.recompute, self._prepared.device
        if options.virtual_stages == 1:
            one = take_whole(task, model, recompute=recompute, seed=seed, device=device)
            compile_calls(self._prepared.job, model)
            return one, {} if tried is None else {0: _shared(self._samples(), tried)}
        layers = layers_for(task, model, order)
        if self._group.rank == 0 and seed is None:
            with tracing:
                check_layers(model, layers, lambda: check_inputs(self._samples()), ModelCall(task))
        points = self.points(layers, None)
        own = range(at.stage, options.virtual_stages, options.pipeline)
        inputs = {}
        if tried is not None:
            some = _shared(check_inputs(self._samples()), tried)
            with tracing:
                inputs = _inputs_of(layers, {stage: [0, *points][stage] for stage in own}, some)
        part = take_part(layers, points, own, recompute=recompute, seed=seed, device=device)
        return part, inputs

    def points(self, layers: Sequence[Layer], known: list[int] | None) -> list[int]:
        """
        Give the cut points, the same on all ranks.

        Args:
            layers: of the model; not looked at where the points are known.
            known: what this rank has found in an attempt before.

        Raises:
            SpecError: the model cannot be cut so.
            CollectiveError: a rank is missing.
        """
        stages, wanted = self._options.virtual_stages, self._options.cut
        if known is None and len(layers) < stages:
            text = f"the model has {len(layers)} layers, too few for {stages} stages"
            hint = "take fewer stages (1 cuts nothing), or have the task's `stages` say more"
            raise _problem("pipeline", text, hint)
        if stages == 1:
            return []
        if wanted != "auto" and known is not None:
            return known
        if wanted == "even":
            return [start for start, _ in split_evenly(len(layers), stages)[1:]]
        if not isinstance(wanted, str):
            return points_before(layers, wanted)
        known_points = [
            points for points in gather_values(known, self._group, self._device) if points
        ]
        if known_points:
            return list(known_points[0])
        points = self._quickest(layers, self._costs(layers))
        if self._group.rank == 0:
            logger.info("the model is cut before %s", ", ".join(layers[p].name for p in points))
        return points

    def _costs(self, layers: Sequence[Layer]) -> list[LayerCost]:
        """Have rank 0 measure the layers, with a micro-batch."""
        values = check_inputs(self._samples(None)) if self._group.rank == 0 else None
        costs = []
        for number, layer in enumerate(layers):
            fields = {}
            if values is not None:
                one, seed = layer, self._seed
                if seed is not None:
                    one = _filled(layer, number, seed, self._device)
                cost, values = measure_layer(one, values, _REPEATS)
                fields = asdict(cost)
            costs.append(LayerCost(**broadcast_value(fields, 0, self._group, self._device)))
        return costs

    def _quickest(self, layers: Sequence[Layer], costs: Sequence[LayerCost]) -> list[int]:
        stages = self._options.virtual_stages
        trained = [any(p.requires_grad for p in layer.module.parameters()) for layer in layers]
        if sum(trained) < stages:
            names = ", ".join(one.name for one, there in zip(layers, trained, strict=True) if there)
            text = f"each of {stages} stages needs something to train, and only {names} has it"
            raise _problem("pipeline", text, "take fewer stages (1 cuts nothing), or freeze less")
        try:
            return cut(costs, stages, self._memory(), trained)
        except ValueError as error:
            raise _problem("cut", str(error), "raise `memory_limit_mb`, or name the cut") from None

    def _memory(self) -> Memory | None:
        """Give what pieces may hold."""
        options = self._options
        if options.memory_limit_mb is None:
            return None
        micro = options.micro(self._prepared.job)
        plan = training_plan(options.schedule, options.pipeline, micro, options.chunks)
        limit = int(options.memory_limit_mb * 2**20 / options.chunks)
        live = [-(-one // options.chunks) for one in plan.schedule.peak_activations()]
        limits = [limit] * options.virtual_stages
        return Memory(limits, live * options.chunks, recompute=options.recompute)

    def _samples(self, most: int | None = _SAMPLES) -> Any:
        """Give inputs of the run's first samples, or with None of its first micro-batch."""
        p = self._prepared
        ids = p.sampler.micro_batches(0, 0, self._options.micro(p.job))[0][:most]
        batch = one_batch(p.data, ids.tolist(), collate_of(p.task))
        return as_pair(p.task, to_device(batch, self._device))[0]


@torch.no_grad()
def _inputs_of(layers: Sequence[Layer], starts: Mapping[int, int], inputs: Any) -> dict[int, Any]:
    """
    Give what enters some virtual stages for a few samples, in evaluation mode.

    Args:
        layers: of the whole model, not sliced.
        starts: by virtual stage, the number of its first layer.
        inputs: of the model.
    """
    inputs_by_stage: dict[int, Any] = {}
    some = layers[: max(starts.values())]
    device = tensor_leaves(inputs)[0].device
    values = on_device(inputs, next((p.device for p in layers[0].module.parameters()), device))
    with untouched(*(layer.module for layer in some)):
        for number in range(len(some) + 1):
            inputs_by_stage |= {
                virtual_stage: copied(values)
                for virtual_stage, start in starts.items()
                if start == number
            }
            if number < len(some):
                values = some[number].module(values)
    return {
        virtual_stage: on_device(value, device) for virtual_stage, value in inputs_by_stage.items()
    }


def _shared(inputs: Any, slices: Collective) -> Any:
    """Give all slices the first one's inputs: each has read them for itself, perhaps at random."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.contiguous()
            slices.broadcast(value)
        return value

    return tree_map(one, inputs)
