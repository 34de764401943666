"""Move a collated batch to the device that computes, and keep the types of what is in it."""

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> tuple[Any, Any]:
    """
    Take a collated (inputs, targets) apart and move its tensors to a device.

    Raises:
        ValueError: it is no pair.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ValueError(
            "a batch must be a pair (inputs, targets): each sample of the data set, or what "
            "collate() gives"
        )
    return moved(batch[0], device), moved(batch[1], device)


def moved(value: Any, device: torch.device) -> Any:
    """
    Move tensors to a device: alone, in containers, in dataclasses, in what has a method `to`.

    What holds nothing that moves is given back as it is, so on the CPU every type is kept. A
    container that cannot be made again with other contents becomes a plain dict or list.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return _mapping(value, {key: moved(item, device) for key, item in value.items()})
    if callable(getattr(value, "to", None)):  # before tuples: a PackedSequence is one
        return value.to(device)
    if isinstance(value, list | tuple):
        return _sequence(value, [moved(item, device) for item in value])
    if is_dataclass(value) and not isinstance(value, type):
        return _dataclass(value, device)
    return value


def _mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    if all(items[key] is item for key, item in value.items()):
        return value
    if type(value) is dict:
        return items
    if isinstance(value, MutableMapping):
        clone = copy.copy(value)  # it may have more than items: a default, an encoding
        clone.update(items)
        return clone
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def _sequence(value: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    if hasattr(value, "_make"):  # a namedtuple takes its items one by one
        return value._make(items)
    try:
        return type(value)(items)
    except TypeError:
        return items


def _dataclass(value: Any, device: torch.device) -> Any:
    there = [field.name for field in fields(value) if hasattr(value, field.name)]
    items = {name: moved(getattr(value, name), device) for name in there}
    if all(getattr(value, name) is item for name, item in items.items()):
        return value
    return with_fields(value, items)


def with_fields(value: Any, items: Mapping[str, Any]) -> Any:
    """Give a copy of a dataclass with other values; its `__init__` may not take them all."""
    clone = copy.copy(value)
    for name, item in items.items():
        object.__setattr__(clone, name, item)  # it may be frozen
    return clone
