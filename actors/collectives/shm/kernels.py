"""Combining the ranks' values, element by element, in rank order."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distplat.platform.even_split import split_evenly
from distplat.strategies.collective import ReduceOp

ALIGN = 128
"""
Vectors are cut at multiples of so many elements.

A cache line is then written by one rank alone, and vectorised loops handle the same elements in
the same way wherever a vector is cut: results are the same bits for any cut.
"""

_PAIRWISE: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
}
_HALF = (torch.float16, torch.bfloat16)


def in_pieces(vector: Tensor, length: int) -> Sequence[Tensor]:
    """Cut a vector into views of one length, the last one shorter; an empty one is one piece."""
    whole, rest = divmod(vector.numel(), length)
    return torch.split_with_sizes(vector, [length] * whole + ([rest] if rest or not whole else []))


def cut_evenly(vector: Tensor, parts: int) -> Sequence[Tensor]:
    """Cut a vector into `parts` views of nearly one length, at `ALIGN`; some may be empty."""
    bounds = split_evenly(vector.numel(), parts, align=ALIGN)
    return torch.split_with_sizes(vector, [b - a for a, b in bounds])


class Scratch:
    """Memory for sums under way; grows to the longest vector combined."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def like(self, vector: Tensor, dtype: torch.dtype) -> Tensor:
        """Give a vector as long as `vector`, with any values."""
        size = vector.numel() * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype)


def combine(parts: Sequence[Tensor], out: Tensor, op: ReduceOp, scratch: Scratch) -> None:
    """
    Write `parts[0] op parts[1] op ...` into `out`, always from left to right.

    Sums and products of 16-bit floats are made in float32 and rounded once.

    Args:
        parts: one vector per rank, shape [n], in rank order; at least one.
        out: shape [n], same dtype; may be one of the parts.
        op: any but AVG, which is a sum that the caller divides.
        scratch: for sums that cannot be made in place.
    """
    pairwise = _PAIRWISE[op]
    first, *rest = parts
    if not rest:
        out.copy_(first)
        return
    second, *rest = rest
    if not rest:  # two 16-bit floats are added as float32 and rounded once by torch as well
        pairwise(first, second, out=out)
        return
    if out.dtype in _HALF and op in (ReduceOp.SUM, ReduceOp.PRODUCT):
        total = scratch.like(out, torch.float32)
        total.copy_(first)
        pairwise(total, second, out=total)
    else:
        later = {part.data_ptr() for part in rest}
        total = scratch.like(out, out.dtype) if out.data_ptr() in later else out
        pairwise(first, second, out=total)
    for part in rest:
        pairwise(total, part, out=total)
    if total is not out:
        out.copy_(total)
