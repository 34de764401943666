"""Whole models in stages, and what all of their layers cost: a rank makes and measures its own."""

from collections.abc import Sequence

from torch import Tensor

from distplat.strategies.algorithms.partition import bounds
from distplat.strategies.model.layers import Layer, Stage, refuse_tied
from distplat.strategies.pipeline.model_partition import LayerCost, measure_layer


def stages_of(layers: Sequence[Layer], points: Sequence[int]) -> list[Stage]:
    """
    Make all stages; the layers are taken over, not copied.

    Raises:
        ValueError: the points leave a stage without layers.
        SpecError: a parameter would be in two stages; names it.
    """
    refuse_tied(layers, points)
    return [Stage(layers[start:stop]) for start, stop in bounds(points, len(layers))]


def profile(layers: Sequence[Layer], inputs: Tensor, repeats: int = 5) -> list[LayerCost]:
    """Measure layers one after the other."""
    costs = []
    for layer in layers:
        cost, inputs = measure_layer(layer, inputs, repeats)
        costs.append(cost)
    return costs
