"""
Exchanges between the ranks of a tensor group, as autograd functions.

                      forward                     backward
    copied (f)        nothing                     sum of the ranks' gradients
    summed (g)        sum of the ranks' parts     nothing
    gathered          all ranks' columns          own columns of the gradient
    scattered         own columns                 all ranks' columns

f and g are those of Shoeybi et al. ("Megatron-LM", 2019): f precedes a split module, g follows it.
A value is *complete* if every rank has all of it with the same bits; gradients of complete values
are complete, too. Every rank makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from typing_extensions import override

from distplat.strategies.collective import Collective

Bounds = Sequence[tuple[int, int]]
"""First and last (exclusive) column, by rank; together they cover all columns."""


def copy_forward(value: Tensor, group: Collective) -> Tensor:
    """
    Use a complete value as the input of each rank's part.

    Raises:
        CollectiveError: in backward, when a rank is missing.
    """
    return apply(_Copied, value, group)


def sum_forward(part: Tensor, group: Collective) -> Tensor:
    """
    Sum the ranks' parts, in place.

    Raises:
        CollectiveError: a rank is missing.
    """
    return apply(_Summed, part, group)


def gathered(columns: Tensor, bounds: Bounds, group: Collective) -> Tensor:
    """
    Concatenate the ranks' columns, along the last dimension.

    Raises:
        CollectiveError: a rank is missing.
    """
    return apply(_Gathered, columns, bounds, group)


def scattered(value: Tensor, bounds: Bounds, group: Collective) -> Tensor:
    """
    Return this rank's columns, along the last dimension, of a complete value.

    Raises:
        CollectiveError: in backward, when a rank is missing.
    """
    return apply(_Scattered, value, bounds, group)


def all_columns(local: Tensor, bounds: Bounds, group: Collective) -> Tensor:
    """Gather all ranks' columns, without autograd."""
    parts = [local.new_empty((*local.shape[:-1], stop - start)) for start, stop in bounds]
    group.all_gather(parts, local.contiguous())
    return torch.cat(parts, dim=-1)


def own_columns(value: Tensor, bounds: Bounds, group: Collective) -> Tensor:
    """Copy this rank's columns."""
    start, stop = bounds[group.rank]
    return value[..., start:stop].contiguous()


def apply(function: type[Function], *arguments: object) -> Tensor:
    """Call `function.apply`, with a typed result."""
    outputs: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return outputs


class _Copied(Function):
    @staticmethod
    @override
    def forward(ctx: Any, value: Tensor, group: Collective) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A copy, because other nodes may still read the incoming gradient.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        ctx.group.all_reduce(total)
        return total, None


class _Summed(Function):
    @staticmethod
    @override
    def forward(ctx: Any, part: Tensor, group: Collective) -> Tensor:
        ctx.mark_dirty(part)
        group.all_reduce(part)
        return part

    @staticmethod
    @override
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Gathered(Function):
    @staticmethod
    @override
    def forward(ctx: Any, columns: Tensor, bounds: Bounds, group: Collective) -> Tensor:
        ctx.bounds, ctx.group = bounds, group
        return all_columns(columns, bounds, group)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return own_columns(gradients[0], ctx.bounds, ctx.group), None, None


class _Scattered(Function):
    @staticmethod
    @override
    def forward(ctx: Any, value: Tensor, bounds: Bounds, group: Collective) -> Tensor:
        ctx.bounds, ctx.group = bounds, group
        return own_columns(value, bounds, group)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return all_columns(gradients[0], ctx.bounds, ctx.group), None, None


_RANGE = 1 << 48


class TensorParallelRegion:
    """
    State of a rank's forward through split modules; one object for all of them.

    Args:
        group: the tensor group.
    """

    def __init__(self, group: Collective) -> None:
        self.group = group  #: of the current attempt
        self._shared_state: Tensor | None = None
        self._generator: torch.Generator | None = None
        self._entered: tuple[Tensor, Tensor] | None = None

    def enter(self, value: Tensor) -> Tensor:
        """Return a complete value as the input of this rank's part; reuse the last one if equal."""
        if self._entered is not None and self._entered[0] is value:
            copied = self._entered[1]
            if copied.requires_grad == (value.requires_grad and torch.is_grad_enabled()):
                return copied
        self._entered = (value, copy_forward(value, self.group))
        return self._entered[1]

    def begin(self, device: torch.device) -> None:
        """Use random numbers of this rank until `end`; a nested call does nothing."""
        if self._generator is not None:
            return
        seed = int(torch.randint(_RANGE, ()))  # on the CPU, to avoid a GPU synchronization
        generator = _generator(device)
        self._shared_state, self._generator = generator.get_state(), generator
        generator.manual_seed(seed * self.group.world + self.group.rank)

    def end(self) -> None:
        """Continue with the random numbers that are the same on all ranks."""
        if self._generator is not None and self._shared_state is not None:
            self._generator.set_state(self._shared_state)
        self.forget()

    def forget(self) -> None:
        """Reset the state before a forward, because the previous forward may have failed."""
        self._generator = self._shared_state = self._entered = None


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
