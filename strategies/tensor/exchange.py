"""
What ranks of a tensor group exchange in forward, and what that means in backward.

                      forward                     backward
    copied (f)        nothing                     sum of the ranks' gradients
    summed (g)        sum of the ranks' parts     nothing
    gathered          all ranks' columns          own columns of the gradient
    scattered         own columns                 all ranks' columns

f and g are those of Shoeybi et al. ("Megatron-LM", 2019): f stands before what is split, g behind
it. A value is *complete* where every rank has the same bits of all of it; gradients of complete
values are complete, too. Every rank makes the same calls in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from distplat.strategies.collective import Collective

Bounds = Sequence[tuple[int, int]]
"""First column and the one behind the last, by rank; together they are all columns."""


def copied(value: Tensor, group: Collective) -> Tensor:
    """
    Let each rank use a complete value for its own part.

    Raises:
        CollectiveError: in backward, when a rank is missing.
    """
    return apply(_Copied, value, group)


def summed(part: Tensor, group: Collective) -> Tensor:
    """
    Add the ranks' parts up, in place.

    Raises:
        CollectiveError: a rank is missing.
    """
    return apply(_Summed, part, group)


def gathered(columns: Tensor, bounds: Bounds, group: Collective) -> Tensor:
    """
    Put the ranks' columns, the last dimension, together.

    Raises:
        CollectiveError: a rank is missing.
    """
    return apply(_Gathered, columns, bounds, group)


def scattered(value: Tensor, bounds: Bounds, group: Collective) -> Tensor:
    """
    Take the own columns, the last dimension, of a complete value.

    Raises:
        CollectiveError: in backward, when a rank is missing.
    """
    return apply(_Scattered, value, bounds, group)


def all_columns(mine: Tensor, bounds: Bounds, group: Collective) -> Tensor:
    """Gather columns without a trace for backward."""
    parts = [mine.new_empty((*mine.shape[:-1], stop - start)) for start, stop in bounds]
    group.all_gather(parts, mine.contiguous())
    return torch.cat(parts, dim=-1)


def own_columns(value: Tensor, bounds: Bounds, group: Collective) -> Tensor:
    """Give the own columns as a tensor of their own."""
    start, stop = bounds[group.rank]
    return value[..., start:stop].contiguous()


def apply(function: type[Function], *arguments: object) -> Tensor:
    """Call a function of ours where autograd sees it."""
    outputs: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return outputs


class _Copied(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Collective) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A copy: what came in may still be read elsewhere.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        ctx.group.all_reduce(total)
        return total, None


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Collective) -> Tensor:
        ctx.mark_dirty(part)
        group.all_reduce(part)
        return part

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Gathered(Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, bounds: Bounds, group: Collective) -> Tensor:
        ctx.bounds, ctx.group = bounds, group
        return all_columns(columns, bounds, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return own_columns(gradients[0], ctx.bounds, ctx.group), None, None


class _Scattered(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, bounds: Bounds, group: Collective) -> Tensor:
        ctx.bounds, ctx.group = bounds, group
        return own_columns(value, bounds, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return all_columns(gradients[0], ctx.bounds, ctx.group), None, None
