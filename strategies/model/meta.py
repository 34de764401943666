"""
Models that no process ever holds whole: built without values, cut, then filled stage by stage.

    on_meta(build)      shapes and names, no memory
    layers, cut
    materialise(...)    values for the own stage's layers only

Each layer draws its values from a generator seeded by (seed, number of the layer), so they do not
depend on where the model is cut. They are not those of a model built in one go, which draws all
layers from one generator in turn. Values are drawn on the CPU: the same bits for every device.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.model.layers import Layer, named_tensors
from distplat.strategies.model.module_hooks import tensor_hooks

_RESET = ("reset_parameters", "_reset_parameters")
"""The second is what some of torch's own modules have, `nn.MultiheadAttention` for one."""


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model without values: whatever it makes takes no memory."""
    with torch.device("meta"):
        return build()


def materialise(layers: Sequence[Layer], first: int, seed: int, device: str = "cpu") -> None:
    """
    Give values to the layers of one stage, in place, and move them to their device.

    Tensors that layers of the stage share stay shared: the first layer's values are taken.

    Args:
        layers: of the stage, built on `meta`.
        first: number of the first of them in the model.
        seed: of the job.
        device: where the stage runs.

    Raises:
        SpecError: a module with parameters or buffers does not say how they begin; names each.
    """
    _check(layers)
    groups = _shared(layers)
    for number, layer in enumerate(layers, start=first):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_layer_seed(seed, number))
            layer.module.to_empty(device="cpu")
            for module in _children_first(layer.module):
                if _own(module):
                    next(getattr(module, name) for name in _RESET if hasattr(module, name))()
    for (home, name), *others in groups:
        for other, its_name in others:
            setattr(other, its_name, getattr(home, name))
    for layer in layers:
        layer.module.to(device)


def _layer_seed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed} layer {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """Give modules in the order in which constructors end: a parent may change its children."""
    seen: set[int] = set()

    def walk(one: nn.Module) -> Iterator[nn.Module]:
        if id(one) not in seen:
            seen.add(id(one))
            for child in one.children():
                yield from walk(child)
            yield one

    return walk(module)


def _check(layers: Sequence[Layer]) -> None:
    problems = []
    for layer in layers:
        for name, part in layer.parts.items():
            if isinstance(part, Tensor):
                hint = "hold it in a module of its own that has one, or do not use `init: meta`"
                problems.append(
                    Problem((), f"{name} is in no module with reset_parameters()", hint)
                )
        for path, tensor in layer.module.named_parameters():
            hooks = tensor_hooks(tensor)
            text = f"{layer.name}.{path} has {' and '.join(hooks)}, and gets its values later"
            problems += [Problem((), text, "do not use `init: meta`")] if hooks else []
        for path, module in layer.module.named_modules():
            if _own(module) and not any(hasattr(module, name) for name in _RESET):
                name = ".".join(part for part in (layer.name, path) if part)
                what = ", ".join(own for own, _ in _own(module))
                problems.append(
                    Problem(
                        (),
                        f"{name} ({type(module).__name__}) has {what} and no reset_parameters()",
                        "give the class one that sets them, or do not use `init: meta`",
                    )
                )
    if problems:
        raise SpecError(*problems)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Give parameters and buffers of a module, those of its children apart."""
    return [*named_tensors(module, recurse=False)]


def _shared(layers: Sequence[Layer]) -> list[list[tuple[nn.Module, str]]]:
    """Give the owners of each tensor that has several; `to_empty` makes a tensor for each."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    seen: set[int] = set()
    for layer in layers:
        for module in layer.module.modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            for name, tensor in _own(module):
                owners.setdefault(id(tensor), []).append((module, name))
    return [some for some in owners.values() if len(some) > 1]
