"""
Ring all-reduce, step by step: Patarasu & Yuan, J. Parallel Distrib. Comput. 69 (2009).

N ranks sit in a ring; each vector is cut into N chunks. In step t rank r passes one chunk to its
right neighbour and takes one from its left. With N = 3, sums growing (0+1: from ranks 0 and 1):

    reduce-scatter          all-gather
    t   send  recv          t   send  recv
    0   r     r-1           0   r+1   r            chunk numbers modulo N: after N-1 steps of the
    1   r-1   r-2           1   r     r-1          first table rank r has chunk r+1 complete

Each rank sends N-1 chunks in each half: 2 (N-1)/N of the vector, independent of N in the limit.
"""

from collections.abc import Iterator

from distplat.platform.even_split import split_evenly


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
