"""What a batch is: how samples are put together, and moved to the device that computes."""

import copy
from abc import ABC
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from distplat.strategies.loop.loaders import ByValue, all_importable
from distplat.strategies.torch_compat import COLLATE_RULES, collate_by

_Rules = dict[type | tuple[type, ...], Callable[..., Any]]


class _Dataclass(ABC):  # noqa: B024  it is only asked for its subclasses
    """What torch's rules do not know; a mapping or a tuple that is one is the other to them."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return hasattr(kind, "__dataclass_fields__") and not issubclass(kind, Mapping | tuple)


def _by_field(batch: list[Any], *, collate_fn_map: _Rules | None = None) -> Any:
    together = {}
    for field in fields(batch[0]):
        values = [getattr(one, field.name, None) for one in batch]
        if any(value is not None for value in values):  # an optional field that nobody has set
            together[field.name] = collate_by(collate_fn_map or {}, values)
    return with_fields(batch[0], together)


_RULES: _Rules = {**COLLATE_RULES, _Dataclass: _by_field}


def collated(samples: list[Any]) -> Any:
    """
    Give the batch of some samples, by torch's rules.

    Raises:
        TypeError: a sample holds what cannot be put together, None for one.
    """
    return collate_by(_RULES, samples)


def sent(batch: Any) -> Any:
    """Give a batch, in a loader process in a form that reaches the worker."""
    if get_worker_info() is None or all_importable(batch):
        return batch
    return ByValue(batch)


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
