"""Gather values that ranks computed from their batches, for metrics over all samples."""

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
    Return the values of all ranks, in the structure of this rank's values; every rank calls this.

    Args:
        values: tensors, in dicts, lists, tuples and dataclasses; numbers count as tensors.
        group: all ranks.
        device: this rank's device.
        batch: number of samples of this rank's last batch, and how many of them are not
            repetitions.

    Returns:
        The ranks' tensors, concatenated along the first dimension. Repeated samples are removed
        from tensors that are as long as the batch.

    Raises:
        SpecError: The values contain another type.
    """
    size, unique = batch
    local: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        is_scalar = tensor.ndim == 0
        vector = tensor.detach().reshape(1) if is_scalar else tensor.detach()
        local.append(vector[:unique] if len(vector) == size and not is_scalar else vector)
        return tensor

    _map_tensors(values, take)
    packed = io.BytesIO()
    torch.save([t.to("cpu", copy=True) for t in local], packed)  # a view would save its storage
    buffers = gather_bytes(packed.getvalue(), group, device)
    ranks = [torch.load(io.BytesIO(buffer), weights_only=True) for buffer in buffers]
    joined = iter([torch.cat(parts).to(device) for parts in zip(*ranks, strict=True)])
    return _map_tensors(values, lambda _: next(joined))


def _map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to each tensor of nested containers, always in the same order."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, bool | int | float):
        return function(torch.tensor(tree))
    if isinstance(tree, MutableMapping) and not isinstance(tree, dict | UserDict):
        tree = dict(tree)  # copying an unknown mapping class may share its items
    if (items := items_in(tree)) is not None:
        return rebuilt(tree, [_map_tensors(item, function) for item in items])
    text = f"gather_for_metrics() got a {type(tree).__name__}"
    hint = "it takes tensors and numbers, in dicts, lists, tuples and dataclasses"
    raise SpecError(Problem(("task",), text, hint))
