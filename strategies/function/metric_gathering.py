"""Gathers what ranks have computed of their batches, for metrics over all samples."""

from __future__ import annotations

import io
from collections import UserDict
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective, gather_bytes
from distplat.strategies.loop.containers import items_in, rebuilt


def gather_for_metrics(
    values: Any, group: Collective, device: torch.device, batch: tuple[int, int]
) -> Any:
    """
    Give the values of all ranks, in the form of this one's; every rank calls this.

    Args:
        values: tensors, in dicts, lists, tuples and dataclasses; numbers count as tensors.
        group: all ranks.
        device: this rank's.
        batch: this rank's last batch: its samples, and how many of them are no repetition.

    Returns:
        Tensors of the ranks one behind the other along their first dimension. Those as long as the
        batch are without the samples that were repeated to fill it.

    Raises:
        SpecError: something else is among them.
    """
    size, own = batch
    mine: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        alone = tensor.ndim == 0
        whole = tensor.detach().reshape(1) if alone else tensor.detach()
        mine.append(whole[:own] if len(whole) == size and not alone else whole)
        return tensor

    _mapped(values, take)
    packed = io.BytesIO()
    torch.save([one.to("cpu", copy=True) for one in mine], packed)  # a view would take all along
    every = gather_bytes(packed.getvalue(), group, device)
    ranks = [torch.load(io.BytesIO(one), weights_only=True) for one in every]
    joined = iter([torch.cat(parts).to(device) for parts in zip(*ranks, strict=True)])
    return _mapped(values, lambda _: next(joined))


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Give nested containers with each tensor changed, always in the same order."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, bool | int | float):
        return change(torch.tensor(tree))
    if isinstance(tree, MutableMapping) and not isinstance(tree, dict | UserDict):
        tree = dict(tree)  # a copy of another kind may share what it holds
    if (items := items_in(tree)) is not None:
        return rebuilt(tree, [_mapped(one, change) for one in items])
    text = f"gather_for_metrics() got a {type(tree).__name__}"
    hint = "it takes tensors and numbers, in dicts, lists, tuples and dataclasses"
    raise SpecError(Problem(("task",), text, hint))
