"""
Sums with a fixed order, so that a repeated run is bitwise reproducible (invariant I2).

Ring all-reduce is such a sum (Patarasu & Yuan, J. Parallel Distrib. Comput. 69 (2009)). N ranks
form a ring; each vector is split into N chunks. In step t rank r sends one chunk to its right
neighbour and receives one from its left. With N = 3:

    reduce-scatter          all-gather
    t   send  recv          t   send  recv
    0   r     r-1           0   r+1   r            chunk numbers modulo N: after N-1 steps of the
    1   r-1   r-2           1   r     r-1          first table rank r has the sum of chunk r+1

Each rank sends N-1 chunks in each half: 2 (N-1)/N of the vector.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distplat.platform.even_split import split_evenly

BLOCK_ELEMENTS = 1 << 18
"""Block size: 1 MiB of float32 fits into a core's cache."""


def sum_in_order(parts: Sequence[Tensor], out: Tensor) -> None:
    """
    Write `parts[0] + parts[1] + ...` into `out`, always from left to right.

    Args:
        parts: one tensor per rank, shape [n], in rank order; at least one.
        out: shape [n], same dtype; may be the first part, but no other.
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
    Return the sum of squares: [n] -> scalar.

    Each block is summed in its own dtype (half precision in float32), the blocks in float64.
    """
    total = 0.0
    dtype = torch.float32 if vector.itemsize < 4 else vector.dtype
    for start in range(0, vector.numel(), BLOCK_ELEMENTS):
        block = vector[start : start + BLOCK_ELEMENTS]
        total += float(torch.linalg.vector_norm(block, dtype=dtype)) ** 2
    return total


def clip_factor(norm: float, limit: float) -> float:
    """Return the factor that scales gradients of 2-norm `norm` to at most `limit`."""
    return min(1.0, limit / (norm + 1e-6))  # 1e-6 as in torch's clip_grad_norm_


def reduce_scatter_steps(rank: int, world: int) -> Iterator[tuple[int, int]]:
    """Return (chunk to send, chunk to receive and add) for each step of reduce-scatter."""
    return (((rank - t) % world, (rank - t - 1) % world) for t in range(world - 1))


def all_gather_steps(rank: int, world: int) -> Iterator[tuple[int, int]]:
    """Return (chunk to send, chunk to receive and copy) for each step of all-gather."""
    return (((rank - t + 1) % world, (rank - t) % world) for t in range(world - 1))


def traffic_elements(elements: int, rank: int, world: int) -> tuple[int, int]:
    """Return the elements that a rank (sends, receives) in a ring all-reduce of `elements`."""
    sizes = [b - a for a, b in split_evenly(elements, world)]
    steps = [*reduce_scatter_steps(rank, world), *all_gather_steps(rank, world)]
    return sum(sizes[send] for send, _ in steps), sum(sizes[recv] for _, recv in steps)
