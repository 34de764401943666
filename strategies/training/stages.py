"""
A model as layers that follow each other, and runs of them as pipeline stages.

    model   Sequential(embedding, blocks.0, blocks.1, head)
    stage 0            embedding, blocks.0                    parameters keep the model's names
    stage 1                                 blocks.1, head

Layers hand on one tensor. A stage's parameters have the names that they have in the whole model, so
what stages save is put together by name, however the model was cut.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.algorithms.partition import bounds

Part = nn.Module | Tensor


@dataclass(frozen=True)
class Layer:
    """One of the modules that follow each other."""

    name: str
    """In the model, for example `blocks.3`."""
    module: nn.Module
    parts: Mapping[str, Part]
    """What of the model it is made of, by name; one part, or several for a module made around
    them. Every parameter and buffer is in one."""


def layers_of(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> list[Layer]:
    """
    Give a model's layers with their names.

    Args:
        model: an `nn.Sequential`; with `modules` any model.
        modules: what makes up the model, in order, as a task's `stages` gives it: parts of the
            model, or modules made around parts.

    Raises:
        SpecError: there is no telling what follows what, one module comes twice, or one has
            parameters that the model does not have.
    """
    if modules is None:
        if not isinstance(model, nn.Sequential):
            raise _problem(
                f"{type(model).__name__} does not say in which order its parts run",
                "give the task a `stages(model)`, or have the model traced",
            )
        modules = list(model)
    names: dict[int, str] = {}
    for name, part in (*model.named_modules(), *_tensors(model)):
        names.setdefault(id(part), name)
    seen: dict[int, int] = {}
    layers = []
    for number, module in enumerate(modules):
        parts = dict(_parts(module, names, f"layer {number}"))
        name = names.get(id(module)) or next(iter(parts), f"{type(module).__name__}_{number}")
        if (first := seen.setdefault(id(module), number)) != number:
            raise _problem(
                f"layers {first} and {number} are one module, {name}",
                "use two modules, or one module around all that lies between them",
            )
        layers.append(Layer(name, module, parts))
    return layers


def _parts(module: nn.Module, names: Mapping[int, str], told: str) -> Iterator[tuple[str, Part]]:
    """Give the largest parts of a module that the model has itself."""
    name = names.get(id(module))
    if name:  # "" is the model
        yield name, module
        return
    for own, tensor in _tensors(module, recurse=False):
        if id(tensor) not in names:
            raise _problem(
                f"{told} has a parameter or buffer that the model does not have: {own}",
                "make it a part of the model",
            )
        yield names[id(tensor)], tensor
    for child in module.children():
        yield from _parts(child, names, told)


class Stage(nn.Module):
    """Layers one behind the other; every parameter has the name that it has in the model."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layer_names = [layer.name for layer in layers]
        self._run = tuple(layer.module for layer in layers)  # a tuple: not registered once more
        for layer in layers:
            for name, part in layer.parts.items():
                self._attach(name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Run all layers.

        Raises:
            SpecError: one gives something else than one tensor.
        """
        for name, module in zip(self.layer_names, self._run, strict=True):
            inputs = one_tensor(name, module(inputs))
        return inputs

    def _attach(self, name: str, part: Part) -> None:
        home: nn.Module = self
        *path, last = name.split(".")
        for step in path:
            if step not in home._modules:
                home.add_module(step, nn.Module())
            home = home.get_submodule(step)
        if isinstance(part, nn.Module):
            home.add_module(last, part)
        elif isinstance(part, nn.Parameter):
            home.register_parameter(last, part)
        else:
            home.register_buffer(last, part)


def one_tensor(name: str, outputs: object) -> Tensor:
    """
    Check what a layer gives.

    Raises:
        SpecError: it is not one tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    raise _problem(
        f"layer {name} gives {type(outputs).__name__}, and layers hand on one tensor",
        "put it and the layers that use what it gives into one module",
    )


def refuse_tied(layers: Sequence[Layer], points: Sequence[int]) -> None:
    """
    Refuse cuts between layers that share a parameter or a buffer.

    Two processes would each train a copy of it, and the copies drift apart without a word.

    Raises:
        SpecError: names every such tensor with all its names and stages.
    """
    found: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for number, (start, stop) in enumerate(bounds(points, len(layers))):
        for layer in layers[start:stop]:
            for name, tensor in _named(layer):
                # The same name in two stages is a module that runs in both.
                found[id(tensor)].setdefault(f"{name} (stage {number})", number)
    problems = []
    for names in found.values():
        if len({*names.values()}) > 1:
            hint = "cut so that they are in one stage, or give each layer a parameter of its own"
            problems.append(Problem((), f"{' and '.join(names)} are one tensor", hint))
    if problems:
        raise SpecError(*problems)


def _named(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    for name, part in layer.parts.items():
        if isinstance(part, nn.Module):
            yield from ((f"{name}.{own}", tensor) for own, tensor in _tensors(part))
        else:
            yield name, part


def _tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def _problem(message: str, hint: str) -> SpecError:
    return SpecError(Problem((), message, hint))
