"""
Weights of linear layers packed once per step, for products with the few rows of a micro-batch.

    usual      micro-batch 0: pack the weights, multiply; micro-batch 1: pack again, multiply; ...
    here       pack;  micro-batch 0: multiply;  micro-batch 1: multiply;  ...

A matrix product brings its operands into the order in which the processor wants them. That costs
as much as reading and writing the weights, and with few rows it is a good part of the product. So
each rank keeps a packed copy of its weights, and one of them transposed for backward, until the
step is over. oneDNN's order is taken, by two operations that torch's compiler uses for frozen
weights; they have no public names, so a torch without them does without packing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_ELEMENTS = 2**18
"""Smaller weights stay in the cache as they are."""
LEAST_USES = 8
"""In a step; packing costs as much as is won in three to seven products."""
MOST_ROWS = 128
"""Of a product; with more of them, packing is lost in the product."""


class _Key(NamedTuple):
    weight: int
    transposed: bool


class Packed:
    """
    Packed weights of one step, and a memory of which those of the last one were.

    Args:
        wanted: False: nothing is packed.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self._may, self._pays = wanted and _KNOWN, False
        self._kept: dict[_Key, Tensor] = {}
        self._wanted: dict[_Key, tuple[Tensor, int]] = {}  #: with the rows they are packed for

    def begin(self, uses: int) -> None:
        """
        Begin a step; weights have changed.

        Args:
            uses: how often each is used in it.
        """
        self._kept.clear()
        self._pays = self._may and uses >= LEAST_USES

    def prepare(self) -> bool:
        """Pack what the last step wanted, where there is nothing else to do; False: it is."""
        if not self._pays or len(self._kept) == len(self._wanted):
            return False
        for key in self._wanted:
            self._get(key)
        return True

    def end(self) -> None:
        """Let go of this step's memory."""
        self._kept.clear()

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """
        Multiply as `functional.linear` does.

        Args:
            rows: shape [..., k].
            weight: shape [n, k].
            bias: shape [n].

        Returns:
            Shape [..., n].
        """
        if not self._suits(rows, weight):
            return torch.nn.functional.linear(rows, weight, bias)
        return self._multiply(rows, weight, bias, transposed=False)

    def back(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """
        Give the gradient of a linear layer's input.

        Args:
            gradient: of its output, shape [..., n].
            weight: shape [n, k].

        Returns:
            Shape [..., k].
        """
        if not self._suits(gradient, weight):
            return gradient @ weight
        return self._multiply(gradient, weight, None, transposed=True)

    def _suits(self, rows: Tensor, weight: Tensor) -> bool:
        return (
            self._pays
            and weight.numel() >= LEAST_ELEMENTS
            and 0 < rows.numel() <= MOST_ROWS * rows.shape[-1]
            and weight.device.type == "cpu"
            and rows.dtype == weight.dtype == torch.float32
        )

    def _multiply(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool
    ) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1]).contiguous()
        key = _Key(id(weight), transposed)
        self._wanted.setdefault(key, (weight, len(flat)))
        found: Tensor = _OPS._linear_pointwise(flat, self._get(key), bias, "none", [], "")
        return found.reshape(*rows.shape[:-1], found.shape[-1])

    def _get(self, key: _Key) -> Tensor:
        packed = self._kept.get(key)
        if packed is None:
            weight, rows = self._wanted[key]
            plain = weight.detach().t() if key.transposed else weight.detach()
            packed = self._kept[key] = _OPS._reorder_linear_weight(plain, rows)
        return packed


_OPS = torch.ops.mkldnn
_KNOWN = torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
    hasattr(_OPS, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)
