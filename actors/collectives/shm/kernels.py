"""Element-wise reductions of the ranks' vectors, in rank order."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distplat.platform.even_split import split_evenly
from distplat.strategies.collective import ReduceOp

ALIGN = 128
"""
Vectors are split at multiples of this number of elements.

So only one rank writes to a cache line, and vectorized loops treat each element in the same way
wherever a vector is split: results are bitwise equal for any split.
"""

_PAIRWISE: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
}
_HALF = (torch.float16, torch.bfloat16)


def split_by_length(vector: Tensor, length: int) -> Sequence[Tensor]:
    """Split a vector into views of `length`, the last one shorter; an empty vector is one view."""
    whole, rest = divmod(vector.numel(), length)
    return torch.split_with_sizes(vector, [length] * whole + ([rest] if rest or not whole else []))


def cut_evenly(vector: Tensor, parts: int) -> Sequence[Tensor]:
    """Split a vector into `parts` views of similar length, at `ALIGN`; views may be empty."""
    bounds = split_evenly(vector.numel(), parts, align=ALIGN)
    return torch.split_with_sizes(vector, [b - a for a, b in bounds])


class Scratch:
    """Memory for intermediate sums; grows to the size of the longest vector."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def like(self, vector: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized vector of the length of `vector`."""
        size = vector.numel() * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype)


def combine(parts: Sequence[Tensor], out: Tensor, op: ReduceOp, scratch: Scratch) -> None:
    """
    Write `parts[0] op parts[1] op ...` into `out`, always from left to right.

    Sums and products of 16-bit floats are computed in float32 and rounded once.

    Args:
        parts: one vector per rank, shape [n], in rank order; at least one.
        out: shape [n], same dtype; may be one of the parts.
        op: any but AVG: for AVG the caller divides a sum.
        scratch: for sums that cannot be computed in place.
    """
    pairwise = _PAIRWISE[op]
    first, *rest = parts
    if not rest:
        out.copy_(first)
        return
    second, *rest = rest
    if not rest:  # torch, too, adds two 16-bit floats in float32 and rounds once
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
