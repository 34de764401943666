"""Sums whose order is fixed, so that a repeated run gives the same bits (invariant I2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Work in blocks that stay in a core's cache: 1 MiB of float32."""


def sum_in_order(parts: Sequence[Tensor], out: Tensor) -> None:
    """
    Write `parts[0] + parts[1] + ...` into `out`, always from left to right.

    Args:
        parts: one tensor per rank, shape [n], in rank order; at least one.
        out: shape [n], same dtype; may be one of the parts only if that is the first.
    """
    for start in range(0, out.numel(), BLOCK_ELEMENTS):
        block = slice(start, start + BLOCK_ELEMENTS)
        if len(parts) == 1:
            out[block].copy_(parts[0][block])
            continue
        torch.add(parts[0][block], parts[1][block], out=out[block])
        for part in parts[2:]:
            out[block].add_(part[block])


def squared_norm(vector: Tensor) -> float:
    """
    Give the sum of squares: [n] -> scalar.

    Of each block in its own dtype, halves in float32; the blocks' sum in float64.
    """
    total = 0.0
    kind = torch.float32 if vector.itemsize < 4 else vector.dtype
    for start in range(0, vector.numel(), BLOCK_ELEMENTS):
        block = vector[start : start + BLOCK_ELEMENTS]
        total += float(torch.linalg.vector_norm(block, dtype=kind)) ** 2
    return total


def clip_factor(norm: float, limit: float) -> float:
    """Give what to multiply gradients of 2-norm `norm` by so that it is at most `limit`."""
    return min(1.0, limit / (norm + 1e-6))  # the 1e-6 is torch's own, in clip_grad_norm_
