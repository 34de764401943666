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

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from distplat.strategies.collective import Collective

Bounds = Sequence[tuple[int, int]]
"""First column and the one behind the last, by rank; together they are all columns."""


def copy_forward(value: Tensor, group: Collective) -> Tensor:
    """
    Let each rank use a complete value for its own part.

    Raises:
        CollectiveError: in backward, when a rank is missing.
    """
    return apply(_Copied, value, group)


def sum_forward(part: Tensor, group: Collective) -> Tensor:
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


_RANGE = 1 << 48


class TensorParallelRegion:
    """
    Follows one process's forward; one object for all split modules of a model.

    Args:
        group: the tensor group.
    """

    def __init__(self, group: Collective) -> None:
        self.group = group  #: of the present attempt
        self._outside: Tensor | None = None
        self._generator: torch.Generator | None = None
        self._way_in: tuple[Tensor, Tensor] | None = None

    def enter(self, value: Tensor) -> Tensor:
        """Give a complete value for use in this rank's part; the same one if it was just given."""
        if self._way_in is not None and self._way_in[0] is value:
            given = self._way_in[1]
            if given.requires_grad == (value.requires_grad and torch.is_grad_enabled()):
                return given
        self._way_in = (value, copy_forward(value, self.group))
        return self._way_in[1]

    def begin(self, device: torch.device) -> None:
        """Draw own numbers from here on; inside of a split this does nothing."""
        if self._generator is not None:
            return
        drawn = int(torch.randint(_RANGE, ()))  # on the CPU: no wait for a GPU
        generator = _generator(device)
        self._outside, self._generator = generator.get_state(), generator
        generator.manual_seed(drawn * self.group.world + self.group.rank)

    def end(self) -> None:
        """Go on with the numbers that all ranks draw alike."""
        if self._generator is not None and self._outside is not None:
            self._generator.set_state(self._outside)
        self.forget()

    def forget(self) -> None:
        """Reset to the state before a forward: the one before may have failed."""
        self._generator = self._outside = self._way_in = None


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
