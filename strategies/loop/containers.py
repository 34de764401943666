"""Access to nested containers of user code: batches, outputs, attributes of a task."""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def items_in(value: Any) -> list[Any] | None:
    """Return the items of a mapping, list, tuple or dataclass; None: not a container."""
    if isinstance(value, Mapping):
        return [*value.values()]
    if isinstance(value, list | tuple):
        return [*value]
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, name) for name in _fields(value)]
    return None


def tensors_in(value: Any, within: tuple[Any, ...] = ()) -> Iterator[Tensor]:
    """Return the tensors in nested containers, in order; `within`: the enclosing containers."""
    if isinstance(value, Tensor):
        yield value
    elif not any(value is parent for parent in within):
        for item in items_in(value) or ():
            yield from tensors_in(item, (*within, value))


def rebuilt(value: Any, items: list[Any]) -> Any:
    """
    Return a copy of a container with other items.

    A container that cannot be copied with other items becomes a plain dict or list.

    Args:
        value: a container, see `items_in`.
        items: the new items, in the order of `items_in`.
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
        by_field = {key: items[key] for key in _fields(value) if key in items}
        return with_fields(value, by_field)
    if isinstance(value, MutableMapping):
        return value
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def _filled(value: MutableMapping[Any, Any], items: Mapping[Any, Any]) -> Mapping[Any, Any]:
    clone = copy.copy(value)  # keeps other state, such as a default factory or an encoding
    if getattr(value, "__dict__", None) is value:  # its items are its attributes
        clone.__dict__ = clone  # type: ignore[assignment]
    for name, attribute in [*getattr(clone, "__dict__", {}).items()]:
        if isinstance(attribute, dict):  # may store the items, and a shallow copy shares it
            vars(clone)[name] = copy.copy(attribute)
    for key, item in items.items():  # `update` of a Counter adds, of a ModelOutput fails
        clone[key] = item
    return clone


def _sequence(value: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    if hasattr(value, "_make"):  # the constructor of a namedtuple takes items as arguments
        return value._make(items)
    try:
        return type(value)(items)
    except TypeError:
        return items


def _fields(value: Any) -> list[str]:
    return [field.name for field in fields(value) if hasattr(value, field.name)]


def with_fields(value: Any, items: Mapping[str, Any]) -> Any:
    """Return a copy of a dataclass with other values, without `__init__`, which may lack some."""
    clone = copy.copy(value)
    for name, item in items.items():
        object.__setattr__(clone, name, item)  # works for frozen dataclasses
    return clone
