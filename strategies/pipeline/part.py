"""
From a model to what one rank holds of it: layers, cut points, the chunks of its stage.

    model ── layers ── points ──▶ places 0, 1, 2, ... along the model, `chunks` of them on a stage
                                  stage s has the places s, s + p, s + 2p, ...

Dropout and its like draw from a generator that is seeded for each layer and micro-batch anew. So
what is drawn does not depend on where the model is cut, nor on how many stages there are.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.algorithms.partition import bounds
from distplat.strategies.algorithms.seeds import mixed
from distplat.strategies.task import Task
from distplat.strategies.tensor.parts import place_of
from distplat.strategies.tensor.plan import ShardSpec
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.meta import materialise
from distplat.strategies.training.parts import Holding
from distplat.strategies.training.recompute import recomputed
from distplat.strategies.training.seeding import seed_quickly
from distplat.strategies.training.stages import Layer, Stage, layers_of, one_tensor, refuse_tied
from distplat.strategies.training.traced import traced_layers

Way = Callable[[], AbstractContextManager[object]]
"""Makes a context: forwards that are made again in backward go the same way."""


class Chunk(Stage):
    """
    Layers one behind the other that run on one rank.

    Args:
        layers: of the model.
        first: number of the first of them in the model.
        recompute: keep the input only, and compute again in backward.
    """

    def __init__(self, layers: Sequence[Layer], first: int, *, recompute: bool = False) -> None:
        super().__init__(layers)
        self._first, self._recompute = first, recompute

    def run(self, inputs: Tensor, seed: int, way: Way = nullcontext) -> Tensor:
        """
        Run all layers on one micro-batch.

        Args:
            inputs: of the first layer.
            seed: of the micro-batch; each layer draws from a generator seeded by it.
            way: makes the context in which layers run.

        Raises:
            SpecError: a layer gives something else than one tensor.
        """
        if self._recompute:
            return recomputed(_Seeded(self, seed, way), inputs)
        return self.seeded(inputs, seed, way)

    def seeded(self, inputs: Tensor, seed: int, way: Way) -> Tensor:
        """Run all layers, whatever is kept for backward."""
        names = zip(self.layer_names, self._run, strict=True)
        with way():
            for number, (name, module) in enumerate(names, start=self._first):
                seed_quickly(mixed(seed, number))
                inputs = one_tensor(name, module(inputs))
        return inputs

    def set_mode(self, *, training: bool) -> None:
        """Switch layers between training and evaluation, those made around parts too."""
        for module in self._run:
            module.train(training)


class _Seeded(nn.Module):
    """A chunk on one micro-batch: what is computed again must draw the same numbers."""

    def __init__(self, chunk: Chunk, seed: int, way: Way) -> None:
        super().__init__()
        self.chunk, self._seed, self._way = chunk, seed, way

    def forward(self, inputs: Tensor) -> Tensor:
        return self.chunk.seeded(inputs, self._seed, self._way)


@dataclass
class Part:
    """What one rank holds."""

    points: list[int]
    """Where the whole model is cut: numbers of the layers with which places begin."""
    chunks: dict[int, Chunk]
    """By place along the model."""
    module: Stage
    """All chunks' layers, with the names that they have in the model."""
    specs: dict[str, ShardSpec] = field(default_factory=dict)
    """Which slice of a tensor this rank has; what is not in it is whole."""
    flat: FlatModel = field(init=False)

    def holding(self, part: int) -> Holding:
        """
        Say what of the whole model this is.

        What is not sliced is the same on all slices, and the first gives it; of a branch that is
        elsewhere there are buffers here, which are not kept up.

        Args:
            part: number of this rank's slice.
        """
        here = self.flat.model.state_dict()
        places = {name: place_of(t.shape, self.specs.get(name)) for name, t in here.items()}
        others = {
            name
            for name in here
            if (not self.specs[name].extent if name in self.specs else part > 0)
        }
        return Holding(places, others)

    def finish(self) -> None:
        """
        Move the parameters onto flat vectors; they are not exchanged by others afterwards.

        Raises:
            SpecError: there is nothing to train.
        """
        if not any(p.requires_grad for p in self.module.parameters()):
            names = ", ".join(self.module.layer_names)
            text = f"a stage would have nothing to train: {names}"
            raise SpecError(Problem(("strategy", "cut"), text, "cut elsewhere, or by `cut: auto`"))
        self.flat = FlatModel(self.module)


def layers_for(task: Task, model: nn.Module) -> list[Layer]:
    """
    Give a model's layers, as the task names them or as a trace finds them.

    Raises:
        SpecError: neither way works, or a parameter of the model is in no layer.
    """
    try:
        modules = task.stages(model)
    except NotImplementedError:
        layers = traced_layers(model)
    else:
        layers = layers_of(model, modules)
    inside = {id(t) for layer in layers for t in _tensors(layer.module)}
    inside |= {id(p) for layer in layers for p in layer.parts.values() if isinstance(p, Tensor)}
    outside = [name for name, tensor in model.named_parameters() if id(tensor) not in inside]
    if outside:
        text = f"parameters of the model are in no stage: {', '.join(outside)}"
        raise SpecError(Problem((), text, "have the task's `stages` name all parts of the model"))
    return layers


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def take_part(
    layers: Sequence[Layer],
    points: Sequence[int],
    places: Sequence[int],
    *,
    recompute: bool,
    seed: int | None,
    device: str,
) -> Part:
    """
    Make what one rank holds; the rest of the model is free to go.

    Args:
        layers: of the whole model.
        points: where it is cut.
        places: which of the pieces are this rank's, rising.
        recompute: see `Chunk`.
        seed: of the job, where layers are on `meta` and still to be given values.
        device: where the rank computes.

    Raises:
        SpecError: a tensor would be on two ranks; names it.
    """
    refuse_tied(layers, points)
    runs = bounds(points, len(layers))
    mine: list[Layer] = []
    chunks = {}
    for place in places:
        start, stop = runs[place]
        some = layers[start:stop]
        if seed is not None:
            materialise(some, start, seed, device)
        for layer in some:
            layer.module.to(device)
        chunks[place] = Chunk(some, start, recompute=recompute)
        mine += some
    return Part(list(points), chunks, Stage(mine))
