"""
Sums whose order is fixed, so that a repeated run gives the same bits (invariant I2).

Ring all-reduce is one such sum (Patarasu & Yuan, J. Parallel Distrib. Comput. 69 (2009)). N ranks
sit in a ring; each vector is cut into N chunks. In step t rank r passes one chunk to its right
neighbour and takes one from its left. With N = 3, sums growing (0+1: from ranks 0 and 1):

    reduce-scatter          all-gather
    t   send  recv          t   send  recv
    0   r     r-1           0   r+1   r            chunk numbers modulo N: after N-1 steps of the
    1   r-1   r-2           1   r     r-1          first table rank r has chunk r+1 complete

Each rank sends N-1 chunks in each half: 2 (N-1)/N of the vector, independent of N in the limit.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distplat.platform.even_split import split_evenly

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


def reduce_scatter_steps(rank: int, world: int) -> Iterator[tuple[int, int]]:
    """Give the (chunk to send, chunk to receive and add) of each step of the first half."""
    return (((rank - t) % world, (rank - t - 1) % world) for t in range(world - 1))


def all_gather_steps(rank: int, world: int) -> Iterator[tuple[int, int]]:
    """Give the (chunk to send, chunk to receive and keep) of each step of the second half."""
    return (((rank - t + 1) % world, (rank - t) % world) for t in range(world - 1))


def traffic_elements(elements: int, rank: int, world: int) -> tuple[int, int]:
    """Give the elements that one rank (sends, receives) in an all-reduce of `elements`."""
    sizes = [b - a for a, b in split_evenly(elements, world)]
    steps = [*reduce_scatter_steps(rank, world), *all_gather_steps(rank, world)]
    return sum(sizes[send] for send, _ in steps), sum(sizes[recv] for _, recv in steps)
