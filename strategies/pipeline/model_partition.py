"""Partition of a model into stages: cut points agreed between the ranks, and each rank's part."""

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
from distplat.strategies.model.layers import TRACE_LOCK, Layer
from distplat.strategies.model.meta import materialise
from distplat.strategies.model.model_call import ModelCall
from distplat.strategies.model.module_options import checkpointed_modules, compile_calls
from distplat.strategies.model.sync_batch_norm import refuse_sync_batch_norm
from distplat.strategies.model.trials import preserve_state
from distplat.strategies.pipeline.call_order import agree_on_order, call_order_of, has_order
from distplat.strategies.pipeline.executor import training_plan
from distplat.strategies.pipeline.hybrid_options import HybridOptions
from distplat.strategies.pipeline.layer_check import check_layers
from distplat.strategies.pipeline.limits import check_inputs, names_of, split_batch
from distplat.strategies.pipeline.rank_model import ModelPart, build_part, build_whole, layers_for
from distplat.strategies.pipeline.slicing_trial import SlicingTrial
from distplat.strategies.pipeline.values import clone_tensors, move_tensors, tensor_leaves
from distplat.strategies.tensor.parallel_plan import resolve
from distplat.strategies.tensor.parallelize import parallelize
from distplat.strategies.torch_compat import tree_map

_SAMPLES = 2
"""Samples for trials of layers; a single one could lose its dimension in a `squeeze`."""


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer for one micro-batch."""

    name: str
    forward_s: float
    backward_s: float
    parameter_bytes: int
    """Bytes of parameters and buffers; a tensor that the layer uses twice counts once."""
    activation_bytes: int
    """Bytes that autograd saves for backward, without parameters."""
    output_bytes: int
    """Bytes sent in each direction if the model is cut after this layer."""


def measure_layer(layer: Layer, inputs: Any, repeats: int) -> tuple[LayerCost, Any]:
    """
    Measure a layer on one micro-batch, without changing the layer or torch's generators.

    Args:
        layer: with values (not on the meta device).
        inputs: in the shapes of a micro-batch; a tree with at least one tensor.
        repeats: runs for the medians, >= 1, after one warm-up run.

    Returns:
        The layer's cost, and its outputs for the next layer.

    Raises:
        SpecError: the layer cannot be copied.
    """
    devices = sorted({tensor.device.index for tensor in tensor_leaves(inputs) if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return _measure_copy(layer, tree_map(_leaf, inputs), repeats)


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.is_floating_point())


def _measure_copy(layer: Layer, inputs: Any, repeats: int) -> tuple[LayerCost, Any]:
    module = _copy(layer)  # gradients and running statistics of the layer must not change
    module.train()  # as in a step: a layer may override train(), such as a frozen batch norm
    saved_memory = _SavedMemory(module)
    cloned = clone_tensors(inputs)  # the layer may work in place
    with torch.autograd.graph.saved_tensors_hooks(saved_memory.pack, lambda saved: saved):
        outputs = module(cloned)
    differentiable = [tensor for tensor in tensor_leaves(outputs) if tensor.requires_grad]
    gradients = [torch.ones_like(tensor) for tensor in differentiable]
    like = tensor_leaves(inputs)[0]
    forwards, backwards = [], []
    for _ in range(repeats + 1):
        cloned = clone_tensors(inputs)
        synchronize(like)
        start = time.perf_counter()
        differentiable = [t for t in tensor_leaves(module(cloned)) if t.requires_grad]
        synchronize(like)
        middle = time.perf_counter()
        if differentiable:
            torch.autograd.backward(differentiable, gradients)
        synchronize(like)
        forwards.append(middle - start)
        backwards.append(time.perf_counter() - middle)
    sizes = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
    cost = LayerCost(
        layer.name,
        median(forwards[1:]),
        median(backwards[1:]),
        sum(sizes.values()),
        saved_memory.bytes,
        sum(tensor.nbytes for tensor in tensor_leaves(outputs)),
    )
    return cost, outputs


def _copy(layer: Layer) -> nn.Module:
    try:
        return copy.deepcopy(layer.module)
    except Exception as error:
        text = f"layer {layer.name} cannot be copied, to be measured: {error}"
        hint = "set `cut: even`, or name the layers to cut before"
        raise SpecError(Problem(("strategy", "cut"), text, hint)) from error


def synchronize(like: Tensor) -> None:
    """Wait until the tensor's device has finished all kernels."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


class _SavedMemory:
    """Sums the memory that autograd saves for backward, each storage once."""

    def __init__(self, module: nn.Module) -> None:
        own = (*module.parameters(), *module.buffers())
        self._seen = {t.untyped_storage().data_ptr() for t in own}
        self._alive: list[Tensor] = []  #: prevents reuse of the addresses by other storages
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a saved tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(tensor.detach())
            self.bytes += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class Memory:
    """Memory limits of stages, and the estimate of their needs from the layers' costs."""

    limit_bytes: Sequence[int]
    """Limit of each stage."""
    live: Sequence[int]
    """Micro-batches that each stage holds at once: the schedule's `peak_activations`."""
    copies: float = 4.0
    """Vectors per parameter: values, gradients and two moments of Adam."""
    recompute: bool = False
    """Whether stages keep only inputs, and activations of one micro-batch during backward."""

    def needed(self, costs: Sequence[LayerCost], k: int, start: int, stop: int) -> float:
        """Return the bytes that stage `k` needs for the layers start..stop-1."""
        layers = costs[start:stop]
        parameters = self.copies * sum(layer.parameter_bytes for layer in layers)
        activations = sum(layer.activation_bytes for layer in layers)
        if not self.recompute:
            return parameters + self.live[k] * activations
        inputs = costs[start - 1].output_bytes if start else 0
        return parameters + self.live[k] * inputs + activations


def cut(
    costs: Sequence[LayerCost],
    parts: int,
    memory: Memory | None = None,
    trained: Sequence[bool] | None = None,
) -> list[int]:
    """
    Choose cut points that minimise the time of the slowest stage.

    Args:
        costs: of the layers.
        parts: number of stages.
        memory: memory limits; None: unlimited.
        trained: of each layer, whether it has trainable parameters, which each stage needs; None:
            all have.

    Returns:
        The first layers of the stages 1, 2, ...

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
    Convert names of layers to cut points: each named layer is the first of a stage.

    Raises:
        SpecError: a name is unknown, or a stage would be empty.
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


def _materialised(layer: Layer, number: int, seed: int, device: torch.device) -> Layer:
    """Return an initialised copy of a layer on the meta device."""
    layer = replace(layer, module=copy.deepcopy(layer.module))
    materialise([layer], number, seed, str(device))
    return layer


def _problem(field: str, message: str, hint: str) -> SpecError:
    return SpecError(Problem(("strategy", field), message, hint))


def agree_on_part(
    options: HybridOptions,
    prepared: Prepared,
    position: Position,
    everybody: Collective,
    slices: Collective | None,
    previous: ModelPart | None,
) -> ModelPart:
    """
    Return a rank's part of the model, and release the whole model.

    Args:
        options: of the strategy.
        prepared: the whole model, and data to measure with.
        position: of this rank.
        everybody: all ranks; each calls this function.
        slices: the ranks that share this rank's layers; None: layers are not sliced.
        previous: this rank's part of an earlier attempt, whose cut points it sends to new ranks.

    Raises:
        SpecError: the model cannot be cut or sliced as the job says.
        CollectiveError: a rank is missing.
    """
    partitioner = _Partitioner(options, prepared, everybody)
    order = partitioner.agree_on_order(previous)
    tries = slices is not None and _all_new(previous is None, slices, prepared.device)
    trial_group, part = slices if tries else None, previous
    if part is None:
        assert prepared.model is not None, "a model that was built and not yet cut"
        names = names_of(prepared.model)
        part, inputs = partitioner.build_part(prepared.model, order, position, trial_group)
        part.names, part.order = names, order
        prepared.model = None
        if slices is not None:
            if trial_group is not None:
                modules = [name for name, _ in part.module.named_modules()]
                planned = resolve(options.tensor_plan, modules, partial=True)
                part.trial = SlicingTrial(part.module, part.chunks, inputs, planned)
            part.specs = parallelize(part.module, options.tensor_plan, slices, partial=True)
        part.flat = FlatModel(part.module, group_of=prepared.job.optimizer.group_of)
    elif options.virtual_stages > 1:
        partitioner.agree_on_points([], part.points)
    return part


def _all_new(new: bool, slices: Collective, device: str) -> bool:
    """Return whether all slices are new ranks, which can run the slicing trial together."""
    old = torch.tensor([int(not new)], device=device)
    slices.all_reduce(old)
    return not int(old)


class _Partitioner:
    """
    Partitions the model; every rank makes the same calls.

    Args:
        options: see `agree_on_part`.
        prepared: see `agree_on_part`.
        group: all ranks.
    """

    def __init__(self, options: HybridOptions, prepared: Prepared, group: Collective) -> None:
        self._options, self._prepared, self._group = options, prepared, group
        self._device = torch.device(prepared.device)
        self._seed = prepared.job.seed if options.init == "meta" else None

    def agree_on_order(self, previous: ModelPart | None) -> CallOrder | None:
        """Return the call order of a model with blocks; None: not needed."""
        p, find_order = self._prepared, None
        is_needed = previous.order is not None if previous else has_order(p.task, p.model)
        if self._options.virtual_stages == 1 or not is_needed:
            return None
        if p.model is not None and self._seed is None:
            find_order = partial(call_order_of, p.model, ModelCall(p.task), self._samples)
        earlier = previous.order if previous else None
        return agree_on_order(find_order, earlier, self._group, self._device)

    def build_part(
        self,
        model: nn.Module,
        order: CallOrder | None,
        position: Position,
        trial_group: Collective | None,
    ) -> tuple[ModelPart, dict[int, Any]]:
        """
        Return the part, and sample inputs of its virtual stages for the slicing trial.

        Args:
            model: the whole model.
            order: call order of its parts; None: not needed.
            position: of this rank.
            trial_group: the slices that run the trial; None: no samples are needed.
        """
        options, task, seed = self._options, self._prepared.task, self._seed
        why = "which `hybrid` does not compute over its replicas"
        refuse_sync_batch_norm(model, why, "use nn.BatchNorm, or `strategy: ring`")
        resolve(options.tensor_plan, [name for name, _ in model.named_modules()])
        checkpointed_modules(self._prepared.job, model)  # validates only: whole stages recompute
        group = trial_group if seed is None else None
        recompute, device = options.recompute, self._prepared.device
        if options.virtual_stages == 1:
            part = build_whole(task, model, recompute=recompute, seed=seed, device=device)
            compile_calls(self._prepared.job, model)
            return part, {} if group is None else {0: _broadcast(self._samples(), group)}
        layers = layers_for(task, model, order)
        if self._group.rank == 0 and seed is None:
            with TRACE_LOCK:
                check_layers(model, layers, lambda: check_inputs(self._samples()), ModelCall(task))
        points = self.agree_on_points(layers, None)
        own_stages = range(position.stage, options.virtual_stages, options.pipeline)
        inputs = {}
        if group is not None:
            samples = _broadcast(check_inputs(self._samples()), group)
            starts = {stage: [0, *points][stage] for stage in own_stages}
            with TRACE_LOCK:
                inputs = _inputs_of(layers, starts, samples)
        part = build_part(layers, points, own_stages, recompute=recompute, seed=seed, device=device)
        return part, inputs

    def agree_on_points(self, layers: Sequence[Layer], previous: list[int] | None) -> list[int]:
        """
        Return the cut points, the same on all ranks.

        Args:
            layers: of the model; ignored if `previous` is given.
            previous: this rank's cut points of an earlier attempt.

        Raises:
            SpecError: the model cannot be cut.
            CollectiveError: a rank is missing.
        """
        stages, cut_option = self._options.virtual_stages, self._options.cut
        if previous is None and len(layers) < stages:
            text = f"the model has {len(layers)} layers, too few for {stages} stages"
            hint = "use fewer stages (1 does not cut), or let the task's `stages` return more"
            raise _problem("pipeline", text, hint)
        if stages == 1:
            return []
        if cut_option != "auto" and previous is not None:
            return previous
        if cut_option == "even":
            return [start for start, _ in split_evenly(len(layers), stages)[1:]]
        if not isinstance(cut_option, str):
            return points_before(layers, cut_option)
        gathered = gather_values(previous, self._group, self._device)
        earlier = next((points for points in gathered if points), None)
        if earlier is not None:
            return list(earlier)
        points = self._fastest_points(layers, self._costs(layers))
        if self._group.rank == 0:
            logger.info("the model is cut before %s", ", ".join(layers[p].name for p in points))
        return points

    def _costs(self, layers: Sequence[Layer]) -> list[LayerCost]:
        """Measure the layers on rank 0 with one micro-batch, and broadcast the costs."""
        values = check_inputs(self._samples(None)) if self._group.rank == 0 else None
        costs = []
        for number, layer in enumerate(layers):
            fields = {}
            if values is not None:
                if self._seed is not None:
                    layer = _materialised(layer, number, self._seed, self._device)
                cost, values = measure_layer(layer, values, _REPEATS)
                fields = asdict(cost)
            costs.append(LayerCost(**broadcast_value(fields, 0, self._group, self._device)))
        return costs

    def _fastest_points(self, layers: Sequence[Layer], costs: Sequence[LayerCost]) -> list[int]:
        stages = self._options.virtual_stages
        trained = [any(p.requires_grad for p in layer.module.parameters()) for layer in layers]
        if sum(trained) < stages:
            pairs = zip(layers, trained, strict=True)
            names = ", ".join(layer.name for layer, is_trained in pairs if is_trained)
            text = f"each of {stages} stages needs something to train, and only {names} has it"
            raise _problem("pipeline", text, "use fewer stages (1 does not cut), or freeze less")
        try:
            return cut(costs, stages, self._memory(), trained)
        except ValueError as error:
            raise _problem("cut", str(error), "raise `memory_limit_mb`, or name the cut") from None

    def _memory(self) -> Memory | None:
        """Return the memory limits of virtual stages; None: unlimited."""
        options = self._options
        if options.memory_limit_mb is None:
            return None
        micro = options.micro(self._prepared.job)
        plan = training_plan(options.schedule, options.pipeline, micro, options.chunks)
        limit = int(options.memory_limit_mb * 2**20 / options.chunks)
        live = [-(-peak // options.chunks) for peak in plan.schedule.peak_activations()]
        limits = [limit] * options.virtual_stages
        return Memory(limits, live * options.chunks, recompute=options.recompute)

    def _samples(self, limit: int | None = _SAMPLES) -> Any:
        """Return inputs of the run's first samples; None: of its whole first micro-batch."""
        p = self._prepared
        ids = p.sampler.micro_batches(0, 0, self._options.micro(p.job))[0][:limit]
        batch = one_batch(p.data, ids.tolist(), collate_of(p.task))
        return split_batch(p.task, to_device(batch, self._device))[0]


@torch.no_grad()
def _inputs_of(layers: Sequence[Layer], starts: Mapping[int, int], inputs: Any) -> dict[int, Any]:
    """
    Return the inputs of virtual stages for a few samples, in evaluation mode.

    Args:
        layers: of the whole model, not sliced.
        starts: first layer, by virtual stage.
        inputs: of the model.
    """
    inputs_by_stage: dict[int, Any] = {}
    needed = layers[: max(starts.values())]
    device = tensor_leaves(inputs)[0].device
    values = move_tensors(inputs, next((p.device for p in layers[0].module.parameters()), device))
    with preserve_state(*(layer.module for layer in needed)):
        for number in range(len(needed) + 1):
            inputs_by_stage |= {
                virtual_stage: clone_tensors(values)
                for virtual_stage, start in starts.items()
                if start == number
            }
            if number < len(needed):
                values = needed[number].module(values)
    return {
        virtual_stage: move_tensors(value, device)
        for virtual_stage, value in inputs_by_stage.items()
    }


def _broadcast(inputs: Any, slices: Collective) -> Any:
    """Broadcast the first slice's inputs: each slice has loaded them, perhaps with randomness."""

    def broadcast_leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.contiguous()
            slices.broadcast(value)
        return value

    return tree_map(broadcast_leaf, inputs)
