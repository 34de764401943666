"""What a task keeps in its attributes: modules, and what is trained beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from distplat.strategies.task import Task


def task_parameters(task: Task, model: nn.Module) -> dict[str, Tensor]:
    """
    Find the trainable parameters in a task's attributes that are not the model's.

    Looked at are parameters, leaf tensors that require a gradient, and modules, alone or in lists,
    tuples and dicts.

    Args:
        task: after its model() was called.
        model: what that gave.

    Returns:
        By path of attributes, such as `log_var` or `heads.0.weight`; each tensor once.
    """
    seen = {id(parameter) for parameter in model.parameters()}
    found: dict[str, Tensor] = {}
    for name, tensor in _tensors(vars(task)):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def task_modules(task: Task, model: nn.Module) -> list[nn.Module]:
    """Give the modules in a task's attributes that are not the model's own, outermost ones."""
    own = {id(module) for module in model.modules()}
    return [module for _, module in _modules(vars(task)) if id(module) not in own]


def _items(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(number), item) for number, item in enumerate(value))


def _modules(value: object) -> Iterator[tuple[str, nn.Module]]:
    for name, item in _items(value):
        if isinstance(item, nn.Module):
            yield name, item
        else:
            yield from ((f"{name}.{rest}", module) for rest, module in _modules(item))


def _tensors(value: object) -> Iterator[tuple[str, Tensor]]:
    for name, item in _items(value):
        if isinstance(item, Tensor):
            if item.requires_grad and item.is_leaf:
                yield name, item
        elif isinstance(item, nn.Module):
            named = item.named_parameters()
            yield from ((f"{name}.{path}", p) for path, p in named if p.requires_grad)
        else:
            yield from ((f"{name}.{rest}", tensor) for rest, tensor in _tensors(item))
