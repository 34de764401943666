"""
What a model's layers cost, and where to cut it into pipeline stages.

    layers --- measured ---> costs --- cut ---> points        by time, within the stages' memory
    layers --- points_before(names) ----------> points        by hand
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.platform.suggest import hint
from distplat.strategies.algorithms.partition import bounds, partition
from distplat.strategies.training.stages import Layer, one_tensor


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


def measured(layer: Layer, inputs: Tensor, repeats: int) -> tuple[LayerCost, Tensor]:
    """
    Measure a layer on one micro-batch; it and torch's generators stay as they were.

    Args:
        layer: with values (not on `meta`).
        inputs: of a micro-batch's shape.
        repeats: medians are of so many, >= 1, after one that does not count.

    Returns:
        Its cost, and its outputs for the next layer.

    Raises:
        SpecError: it gives something else than one tensor.
    """
    devices = [inputs.device] if inputs.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return _measured(layer, inputs.detach(), repeats)


def _measured(layer: Layer, inputs: Tensor, repeats: int) -> tuple[LayerCost, Tensor]:
    module = _copy(layer)  # gradients and running statistics are not to change
    inputs.requires_grad_(inputs.is_floating_point())
    kept = _Kept(module)
    given = inputs.clone()  # the layer may work in place; each time on the same values
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved):
        outputs = one_tensor(layer.name, module(given))
    gradient = torch.ones_like(outputs)
    forwards, backwards = [], []
    for _ in range(repeats + 1):
        given = inputs.clone()
        wait(inputs)
        start = time.perf_counter()
        made = module(given)
        wait(inputs)
        middle = time.perf_counter()
        if made.requires_grad:
            torch.autograd.backward(made, gradient)
        wait(inputs)
        forwards.append(middle - start)
        backwards.append(time.perf_counter() - middle)
    own = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
    cost = LayerCost(
        layer.name,
        median(forwards[1:]),
        median(backwards[1:]),
        sum(own.values()),
        kept.bytes,
        outputs.nbytes,
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


def cut(costs: Sequence[LayerCost], parts: int, memory: Memory | None = None) -> list[int]:
    """
    Choose cut points so that the slowest stage is as quick as can be.

    Returns:
        The numbers of the layers with which the stages 1, 2, ... begin.

    Raises:
        ValueError: there are fewer layers than stages, or no cut fits into the memory.
    """
    seconds = [cost.forward_s + cost.backward_s for cost in costs]
    if memory is None:
        return partition(seconds, parts)
    if not len(memory.limit_bytes) == len(memory.live) == parts:
        raise ValueError(f"limits and live micro-batches must be given for each of {parts} stages")

    def fits(k: int, start: int, stop: int) -> bool:
        return memory.needed(costs, k, start, stop) <= memory.limit_bytes[k]

    return partition(seconds, parts, fits)


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
        raise SpecError(Problem((), message, hint(unknown[0], [*places][1:])))
    points = [places[name] for name in names]
    try:
        bounds(points, len(layers))
    except ValueError as error:
        raise SpecError(str(error)) from error
    return points
