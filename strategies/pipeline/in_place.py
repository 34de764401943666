"""
Weights' gradients of linear layers, added up inside the matrix product.

    autograd    product ──▶ a new matrix as large as the weights ──▶ added to `weight.grad`
    here        product ─────────────────────────────────────────▶ added to `weight.grad`

A micro-batch has few rows, so its products are cheap, and writing that matrix and reading it again
is a good part of a step: once for every layer and micro-batch. (Megatron-LM does the same on GPUs.)
Parameters' hooks are not to be trusted then: a step's last micro-batch, whose gradients are final,
goes the usual way.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class InPlace(TorchFunctionMode):
    """While active, `linear` on parameters that have a gradient of their own dtype adds to it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See torch."""
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and torch.is_grad_enabled() and _fits(*args):
            return _Linear.apply(*args, *[None] * (3 - len(args)))  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _fits(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether all is of one dtype, and gradients are there to be added to."""
    if torch.is_autocast_enabled(weight.device.type) or inputs.dtype != weight.dtype:
        return False
    own = [weight] if bias is None else [weight, bias]
    return all(p.is_leaf and p.requires_grad and p.grad is not None for p in own)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.bias = bias
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        inputs, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows = gradient.reshape(-1, gradient.shape[-1])
        weight.grad.addmm_(rows.t(), inputs.reshape(-1, inputs.shape[-1]))
        if ctx.bias is not None:
            ctx.bias.grad.add_(rows.sum(0))
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None
