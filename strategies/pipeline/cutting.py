"""
Where a model is cut, agreed between the ranks.

    even            as many layers for each place
    names           before the layers named
    auto            rank 0 measures one layer after the other and tells the others each time, so
                    that nobody waits longer than a layer takes; then all compute the same cut

A rank that comes later takes the points that the others have: their parts stay what they are.
"""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from distplat.platform.errors import Problem, SpecError
from distplat.platform.even_split import split_evenly
from distplat.strategies.algorithms.partition import partition
from distplat.strategies.collective import Collective
from distplat.strategies.training.cut import LayerCost, Memory, measured, points_before
from distplat.strategies.training.meta import materialise
from distplat.strategies.training.object_collectives import broadcast_bytes, gather_bytes
from distplat.strategies.training.stages import Layer

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
    wish: CutRequest,
    known: list[int] | None,
    inputs: Callable[[], Tensor],
    group: Collective,
    device: torch.device,
) -> list[int]:
    """
    Give the cut points, the same on all ranks.

    Args:
        layers: of the model.
        wish: of the job.
        known: what this rank has found in an attempt before.
        inputs: gives a micro-batch to measure with, on `device`; called on rank 0 only.
        group: all ranks; each calls this.
        device: where layers are, or will be.

    Raises:
        SpecError: the model cannot be cut so.
        CollectiveError: a rank is missing.
    """
    if known is None and len(layers) < wish.places:
        text = f"the model has {len(layers)} layers, too few for {wish.places} places"
        raise _problem("pipeline", text, "take fewer stages, or have the task's `stages` say more")
    if wish.places == 1:
        return []
    if wish.cut != "auto" and known is not None:
        return known
    if wish.cut == "even":
        return [start for start, _ in split_evenly(len(layers), wish.places)[1:]]
    if not isinstance(wish.cut, str):
        return _by_name(layers, wish.cut)
    told = gather_bytes(json.dumps(known).encode(), group, device)
    found = [points for points in map(json.loads, told) if points]
    if found:
        return list(found[0])
    costs = _measure(layers, inputs, wish.meta_seed, group, device)
    points = _cut(layers, costs, wish)
    if group.rank == 0:
        logger.info("the model is cut before %s", ", ".join(layers[p].name for p in points))
    return points


def _by_name(layers: Sequence[Layer], names: Sequence[str]) -> list[int]:
    try:
        return points_before(layers, names)
    except SpecError as error:
        where = ("strategy", "cut")
        raise SpecError(*(replace(problem, where=where) for problem in error.problems)) from None


def _measure(
    layers: Sequence[Layer],
    inputs: Callable[[], Tensor],
    meta_seed: int | None,
    group: Collective,
    device: torch.device,
) -> list[LayerCost]:
    here = group.rank == 0
    values = inputs() if here else None
    costs = []
    for number, layer in enumerate(layers):
        text = b""
        if values is not None:
            one = layer if meta_seed is None else _filled(layer, number, meta_seed, device)
            cost, values = measured(one, values, _REPEATS)
            text = json.dumps(asdict(cost)).encode()
        costs.append(LayerCost(**json.loads(broadcast_bytes(text, 0, group, device))))
    return costs


def _filled(layer: Layer, number: int, seed: int, device: torch.device) -> Layer:
    """Give a copy of a layer on `meta`, with values: no more than one layer is there at once."""
    one = replace(layer, module=copy.deepcopy(layer.module))
    materialise([one], number, seed, str(device))
    return one


def _cut(layers: Sequence[Layer], costs: Sequence[LayerCost], wish: CutRequest) -> list[int]:
    trained = [any(p.requires_grad for p in layer.module.parameters()) for layer in layers]

    def fits(k: int, start: int, stop: int) -> bool:
        if not any(trained[start:stop]):
            return False
        memory = wish.memory
        return memory is None or memory.needed(costs, k, start, stop) <= memory.limit_bytes[k]

    seconds = [cost.forward_s + cost.backward_s for cost in costs]
    try:
        return partition(seconds, wish.places, fits)
    except ValueError as error:
        hint = "raise `memory_limit_mb`, or name the cut" if wish.memory else "name the cut"
        raise _problem("cut", str(error), hint) from None


def _problem(field: str, message: str, hint: str) -> SpecError:
    return SpecError(Problem(("strategy", field), message, hint))
