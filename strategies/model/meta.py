"""
Meta-device initialization for models that do not fit into one process.

    on_meta(build)      shapes and names, no memory
    layers, cut
    materialise(...)    initial values of this stage's layers only

Each layer is initialized by a generator seeded with (seed, number of the layer), so its values do
not depend on where the model is cut. The values differ from those of a model built without `meta`,
which uses one generator for all layers. Initialization runs on the CPU: the same bits for every
device.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.model.layers import Layer, named_tensors
from distplat.strategies.model.module_hooks import tensor_hooks

_RESET = ("reset_parameters", "_reset_parameters")
"""Some modules of torch, such as `nn.MultiheadAttention`, have the second name."""


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the meta device, without allocating memory."""
    with torch.device("meta"):
        return build()


def materialise(layers: Sequence[Layer], first: int, seed: int, device: str = "cpu") -> None:
    """
    Initialize the layers of one stage, in place, and move them to their device.

    Tensors shared by layers of the stage stay shared, with the first layer's values.

    Args:
        layers: of the stage, built on `meta`.
        first: number of the first of the layers in the model.
        seed: of the job.
        device: where the stage runs.

    Raises:
        SpecError: modules with parameters or buffers have no `reset_parameters`; names each.
    """
    _check_initializers(layers)
    groups = _shared_tensors(layers)
    for number, layer in enumerate(layers, start=first):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_layer_seed(seed, number))
            layer.module.to_empty(device="cpu")
            for module in _children_first(layer.module):
                if _own_tensors(module):
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
    """Yield modules in the order in which constructors end: a parent may change its children."""
    seen: set[int] = set()

    def walk(parent: nn.Module) -> Iterator[nn.Module]:
        if id(parent) not in seen:
            seen.add(id(parent))
            for child in parent.children():
                yield from walk(child)
            yield parent

    return walk(module)


def _check_initializers(layers: Sequence[Layer]) -> None:
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
            if _own_tensors(module) and not any(hasattr(module, name) for name in _RESET):
                name = ".".join(part for part in (layer.name, path) if part)
                tensors = ", ".join(own for own, _ in _own_tensors(module))
                problems.append(
                    Problem(
                        (),
                        f"{name} ({type(module).__name__}) has {tensors} and no reset_parameters()",
                        "give the class one that sets them, or do not use `init: meta`",
                    )
                )
    if problems:
        raise SpecError(*problems)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's own parameters and buffers, without those of its children."""
    return [*named_tensors(module, recurse=False)]


def _shared_tensors(layers: Sequence[Layer]) -> list[list[tuple[nn.Module, str]]]:
    """Return the owners of each shared tensor; `to_empty` creates a tensor for each owner."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    seen: set[int] = set()
    for layer in layers:
        for module in layer.module.modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            for name, tensor in _own_tensors(module):
                owners.setdefault(id(tensor), []).append((module, name))
    return [group for group in owners.values() if len(group) > 1]
