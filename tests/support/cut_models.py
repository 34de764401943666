"""All stages and layer costs of a model; in a run, a rank builds and measures its own only."""

from collections.abc import Sequence

from torch import Tensor

from distplat.strategies.algorithms.partition import bounds
from distplat.strategies.model.layers import Layer, Stage, refuse_tied
from distplat.strategies.pipeline.model_partition import LayerCost, measure_layer


def stages_of(layers: Sequence[Layer], points: Sequence[int]) -> list[Stage]:
    """
    Build all stages; the layers are not copied.

    Raises:
        ValueError: a stage has no layers.
        SpecError: a parameter would be in two stages; names the parameter.
    """
    refuse_tied(layers, points)
    return [Stage(layers[start:stop]) for start, stop in bounds(points, len(layers))]


def profile(layers: Sequence[Layer], inputs: Tensor, repeats: int = 5) -> list[LayerCost]:
    """Measure all layers in sequence."""
    costs = []
    for layer in layers:
        cost, inputs = measure_layer(layer, inputs, repeats)
        costs.append(cost)
    return costs
