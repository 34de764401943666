"""What nested values of a user's code hold: batches, outputs, what a task keeps."""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def items_in(value: Any) -> list[Any] | None:
    """Give what a mapping, a list, a tuple or a dataclass holds; None: it is none of them."""
    if isinstance(value, Mapping):
        return [*value.values()]
    if isinstance(value, list | tuple):
        return [*value]
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, name) for name in _fields(value)]
    return None


def tensors_in(value: Any, within: tuple[Any, ...] = ()) -> Iterator[Tensor]:
    """Give the tensors in nested containers, in order; `within`: those around this one."""
    if isinstance(value, Tensor):
        yield value
    elif not any(value is one for one in within):
        for one in items_in(value) or ():
            yield from tensors_in(one, (*within, value))


def rebuilt(value: Any, items: list[Any]) -> Any:
    """
    Give a copy of a container with other items.

    One that cannot be made again with other contents becomes a plain dict or list.

    Args:
        value: what `items_in` takes apart.
        items: as many as it holds, in the same order.
    """
    if isinstance(value, Mapping):
        return _mapping(value, dict(zip(value, items, strict=True)))
    if isinstance(value, list | tuple):
        return _sequence(value, items)
    return with_fields(value, dict(zip(_fields(value), items, strict=True)))


def _mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(value) is dict:
        return items
    if isinstance(value, MutableMapping):
        value = _filled(value, items)
    if is_dataclass(value):  # such as the outputs of Hugging Face's models
        own = {key: items[key] for key in _fields(value) if key in items}
        return with_fields(value, own)
    if isinstance(value, MutableMapping):
        return value
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def _filled(value: MutableMapping[Any, Any], items: Mapping[Any, Any]) -> Mapping[Any, Any]:
    clone = copy.copy(value)  # it may have more than items: a default, an encoding
    if getattr(value, "__dict__", None) is value:  # its items are its attributes
        clone.__dict__ = clone  # type: ignore[assignment]
    for name, held in [*getattr(clone, "__dict__", {}).items()]:
        if isinstance(held, dict):  # where the items are, which a copy shares
            vars(clone)[name] = copy.copy(held)
    for key, item in items.items():  # `update` of a Counter adds, of a ModelOutput fails
        clone[key] = item
    return clone


def _sequence(value: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    if hasattr(value, "_make"):  # a namedtuple takes its items one by one
        return value._make(items)
    try:
        return type(value)(items)
    except TypeError:
        return items


def _fields(value: Any) -> list[str]:
    return [field.name for field in fields(value) if hasattr(value, field.name)]


def with_fields(value: Any, items: Mapping[str, Any]) -> Any:
    """Give a copy of a dataclass with other values; its `__init__` may not take them all."""
    clone = copy.copy(value)
    for name, item in items.items():
        object.__setattr__(clone, name, item)  # it may be frozen
    return clone
