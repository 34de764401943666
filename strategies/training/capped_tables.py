"""
`nn.Embedding(max_norm=...)` where workers and servers share the memory of the parameters.

torch scales rows down in place when they are looked up. Several workers would do so in one memory
at the same time, and scale a row twice. Here a lookup is made in a copy, whose gradient is the
table's; what ranks have scaled is written once, by rank 0, before any rank pushes the step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distplat.strategies.collective import Collective, ReduceOp


def is_capped(module: nn.Module) -> bool:
    """Say whether a lookup in this module may scale rows of its table."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


class CappedTables:
    """
    The tables of one worker's model.

    Args:
        model: its embeddings with `max_norm` get another `forward` until `close`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for layer in model.modules() if is_capped(layer)]
        self._values: dict[int, Tensor] = {}  #: by layer, the table as it should be
        for number, layer in enumerate(self._layers):
            layer.forward = partial(self._look_up, number, layer)

    def close(self) -> None:
        """Give the layers their own `forward` back."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    def forget(self) -> None:
        """Take nothing of what was scaled for good."""
        self._values.clear()

    def write(self, group: Collective | None) -> None:
        """
        Have the tables as all ranks' lookups leave them; returns when they are.

        Raises:
            CollectiveError: a rank is missing.
        """
        for number, layer in enumerate(self._layers):
            table = layer.get_parameter("weight").detach()
            values = self._values.get(number, table)
            if group is not None and group.world > 1:
                values = first_written(values, table, group)
            if group is None or group.rank == 0:
                table.copy_(values)
        self._values.clear()
        if group is not None:
            group.barrier()

    def _look_up(self, number: int, layer: nn.Module, *inputs: Any, **named: Any) -> Any:
        table = layer.get_parameter("weight")
        copy = table.clone()
        layer._parameters["weight"] = copy  # type: ignore[assignment]
        try:
            outputs = type(layer).forward(layer, *inputs, **named)
        finally:
            layer._parameters["weight"] = table
        scaled, before = copy.detach(), self._values.get(number)
        if before is not None:
            scaled = torch.where(scaled != table.detach(), scaled, before)
        self._values[number] = scaled.clone()
        return outputs


def first_written(now: Tensor, before: Tensor, group: Collective) -> Tensor:
    """
    Give each element as the first rank left it that changed it; the same on all ranks.

    Args:
        now: this rank's values.
        before: what all ranks had, of the same shape.
        group: each of its ranks calls this.
    """
    values, old = now.contiguous().view(-1), before.contiguous().view(-1)
    return _merged(values, values != old, old, group).view(now.shape)


def first_writer(now: Tensor, group: Collective, *, wrote: bool) -> Tensor:
    """Give the whole tensor of the first rank that `wrote` it; for want of what it was before."""
    values = now.contiguous().view(-1)
    changed = torch.full(values.shape, wrote, device=values.device)
    return _merged(values, changed, values, group).view(now.shape)


def _merged(values: Tensor, changed: Tensor, old: Tensor, group: Collective) -> Tensor:
    owner = torch.full(values.shape, group.world, dtype=torch.int32, device=values.device)
    owner[changed] = group.rank
    group.all_reduce(owner, ReduceOp.MIN)
    theirs = torch.where(owner == group.rank, values, torch.zeros_like(values))
    group.all_reduce(theirs)
    return torch.where(owner < group.world, theirs, old)
