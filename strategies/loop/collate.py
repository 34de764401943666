"""Collating samples into batches, and moving batches to a device."""

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from typing_extensions import override

from distplat.strategies.loop.containers import items_in, rebuilt, with_fields
from distplat.strategies.loop.loaders import ByValue, all_importable
from distplat.strategies.torch_compat import COLLATE_RULES, collate_with_rules

_Rules = dict[type | tuple[type, ...], Callable[..., Any]]


class _Dataclass(ABC):  # noqa: B024  used in issubclass() only
    """Any dataclass, except mappings and tuples, which have rules of torch."""

    @classmethod
    @override
    def __subclasshook__(cls, subclass: type) -> bool:
        return hasattr(subclass, "__dataclass_fields__") and not issubclass(
            subclass, Mapping | tuple
        )


def _by_field(batch: list[Any], *, collate_fn_map: _Rules | None = None) -> Any:
    collated_fields = {}
    for field in fields(batch[0]):
        values = [getattr(sample, field.name, None) for sample in batch]
        if any(value is not None for value in values):  # an optional field may be None everywhere
            collated_fields[field.name] = collate_with_rules(collate_fn_map or {}, values)
    return with_fields(batch[0], collated_fields)


_RULES: _Rules = {**COLLATE_RULES, _Dataclass: _by_field}


def collated(samples: list[Any]) -> Any:
    """
    Collate samples into a batch by torch's rules, extended to dataclasses.

    Raises:
        TypeError: a sample has a value that cannot be collated, such as None.
    """
    return collate_with_rules(_RULES, samples)


def sendable(batch: Any) -> Any:
    """Return a batch; in a loader process, wrapped if the worker could not unpickle it."""
    if get_worker_info() is None or all_importable(batch):
        return batch
    return ByValue(batch)


def to_device(value: Any, device: torch.device) -> Any:
    """
    Move tensors to a device: also in containers, dataclasses and objects with a method `to`.

    Containers without moved tensors are returned unchanged, so on the CPU every type is kept. A
    container that cannot be copied with other items becomes a plain dict or list.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if not isinstance(value, Mapping) and callable(getattr(value, "to", None)):
        return value.to(device)  # such as a PackedSequence
    items = items_in(value) or []
    moved = [to_device(item, device) for item in items]
    unchanged = all(new is old for new, old in zip(moved, items, strict=True))
    return value if unchanged else rebuilt(value, moved)
