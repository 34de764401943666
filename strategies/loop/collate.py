"""What a batch is: how samples are put together, and moved to the device that computes."""

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from distplat.strategies.loop.containers import items_in, rebuilt, with_fields
from distplat.strategies.loop.loaders import ByValue, all_importable
from distplat.strategies.torch_compat import COLLATE_RULES, collate_with_rules

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
            together[field.name] = collate_with_rules(collate_fn_map or {}, values)
    return with_fields(batch[0], together)


_RULES: _Rules = {**COLLATE_RULES, _Dataclass: _by_field}


def collated(samples: list[Any]) -> Any:
    """
    Give the batch of some samples, by torch's rules.

    Raises:
        TypeError: a sample holds what cannot be put together, None for one.
    """
    return collate_with_rules(_RULES, samples)


def sendable(batch: Any) -> Any:
    """Give a batch, in a loader process in a form that reaches the worker."""
    if get_worker_info() is None or all_importable(batch):
        return batch
    return ByValue(batch)


def to_device(value: Any, device: torch.device) -> Any:
    """
    Move tensors to a device: alone, in containers, in dataclasses, in what has a method `to`.

    What holds nothing that moves is given back as it is, so on the CPU every type is kept. A
    container that cannot be made again with other contents becomes a plain dict or list.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if not isinstance(value, Mapping) and callable(getattr(value, "to", None)):
        return value.to(device)  # a PackedSequence for one
    items = items_in(value) or []
    there = [to_device(item, device) for item in items]
    same = all(new is old for new, old in zip(there, items, strict=True))
    return value if same else rebuilt(value, there)
