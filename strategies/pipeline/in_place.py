"""
Weights' gradients of linear layers, added up inside matrix products of several micro-batches.

    autograd   micro-batch 0: product ─▶ a matrix as large as the weights ─▶ added to `weight.grad`
               micro-batch 1: product ─▶ another one                      ─▶ added, ...
    here       micro-batches 0, 1, 2, ... until they have rows enough: one product that adds

A micro-batch has few rows, so its product is cheap, and writing matrices and reading them again is
a good part of a step. (Megatron-LM adds inside the product on GPUs.) No stage waits for a weight's
gradient, so products of small micro-batches are put off until the input's gradient has been sent;
which rows go together does not depend on when, so neither do the bits.

Parameters' hooks are not to be trusted then: where a step's last micro-batch has gradients that
somebody waits for, it goes the usual way, and nothing is left of those before when it comes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from distplat.strategies.pipeline.packed import Packed

ENOUGH_ROWS = 64
"""A product of so many rows computes for longer than it takes to read and write the weights'
gradient. About so many rows of inputs and gradients are kept for each layer, and no more; if one
micro-batch has as many, its product is made at once."""

_Rows = tuple[Tensor, Tensor]


class _Layer(NamedTuple):
    weight: Tensor
    """Shape [n, k]."""
    bias: Tensor | None
    """Shape [n]."""


class Sums:
    """
    Products of one step's linear layers.

    Args:
        packed: weights, for products with few rows.
    """

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self._pending: defaultdict[int, list[_Rows]] = defaultdict(list)  #: by weight
        self._due: list[tuple[_Layer, list[_Rows]]] = []  #: products with rows enough

    def add(self, layer: _Layer, found: _Rows, *, flush: bool) -> None:
        """
        Add a layer's gradients for some rows, now or with later ones.

        Args:
            layer: whose parameters have gradients.
            found: gradients of outputs, shape [rows, n], and inputs, shape [rows, k].
            flush: nothing is to be left over but what is due.
        """
        waiting = self._pending[id(layer.weight)]
        if len(found[0]) >= ENOUGH_ROWS and not waiting:
            _multiply(layer, [found])
            return
        # The memory of what was found is used again.
        waiting.append((found[0].clone(), found[1].clone()))
        if flush or sum(len(rows) for rows, _ in waiting) >= ENOUGH_ROWS:
            self._due.append((layer, [*waiting]))
            waiting.clear()

    def settle(self) -> bool:
        """Make the products that are due; False: there were none."""
        due, self._due = self._due, []
        for layer, together in due:
            _multiply(layer, together)
        return bool(due)


def _multiply(layer: _Layer, together: list[_Rows]) -> None:
    rows, inputs = together[0]
    if len(together) > 1:
        rows, inputs = (torch.cat(parts) for parts in zip(*together, strict=True))
    weight, bias = layer
    assert weight.grad is not None, "only such layers come here"
    weight.grad.addmm_(rows.t(), inputs)
    if bias is not None and bias.grad is not None:
        bias.grad.add_(rows.sum(0))


class InPlace(TorchFunctionMode):
    """
    While active, `linear` on parameters that have a gradient of their own dtype goes this way.

    Args:
        sums: of the step.
        flush: whether this is the last micro-batch that goes this way.
    """

    def __init__(self, sums: Sums, *, flush: bool) -> None:
        super().__init__()
        self._sums, self._flush = sums, flush

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
            bias = args[2] if len(args) > 2 else None
            return _Linear.apply(*args[:2], bias, self._sums, self._flush)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _fits(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether all is of one dtype, and gradients are there to be added to."""
    if torch.is_autocast_enabled(weight.device.type) or inputs.dtype != weight.dtype:
        return False
    own = [weight] if bias is None else [weight, bias]
    return all(p.is_leaf and p.requires_grad and p.grad is not None for p in own)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, sums: Sums, flush: bool
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        # Not saved: a hook on what is saved may hand back another tensor, without the gradient.
        ctx.layer, ctx.sums, ctx.flush = _Layer(weight, bias), sums, flush
        return sums.packed.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (inputs,), weight = ctx.saved_tensors, ctx.layer.weight
        gradient = gradients[0]
        found = gradient.reshape(-1, weight.shape[0]), inputs.reshape(-1, weight.shape[1])
        ctx.sums.add(ctx.layer, found, flush=ctx.flush)
        back = ctx.sums.packed.back(gradient, weight) if ctx.needs_input_grad[0] else None
        return back, None, None, None, None
