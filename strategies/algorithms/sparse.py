"""
The k entries of largest magnitude, found without sorting: what top-k compression sends.

Finding the k-th largest of ten million entries takes several times as long as reading them. A
sample says almost where the k-th largest lies; one pass over the vector then leaves a few
candidates too many, among which the search is exact:

    entries   |....:...|..:.....|........|.:......|      ':' at or above the guess: candidates
    guess      from every s-th entry, a little low, so that there are seldom fewer than k
    answer     the k largest candidates, in the order of their places

A bad sample costs time and never changes the answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_SAMPLE = 1 << 16
_BLOCK_ELEMENTS = 1 << 17
"""Passes on a CPU go in blocks that stay in a core's cache."""


def entries_sent(density: float, size: int) -> int:
    """Give the number of entries that `density` of a vector of `size` is; at least one."""
    return max(1, round(density * size))


def largest(vector: Tensor, count: int) -> Tensor:
    """
    Give the places of the `count` entries of largest magnitude, in ascending order.

    Of equal magnitudes the first places win. NaN counts as infinite: it must travel, so that
    training fails in sight instead of one entry standing still.

    Args:
        vector: shape [n].
        count: from 1 to n.

    Returns:
        Places, shape [count], int64.
    """
    if count == vector.numel():
        return torch.arange(count, device=vector.device)
    candidates = _candidates(vector, count)
    sizes = vector[candidates].abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    least = sizes.topk(count, sorted=False).values.min()
    chosen = sizes > least
    ties = (sizes == least).nonzero().view(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return candidates[chosen]


def add_sparse(out: Tensor, places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """
    Add entries to `out`, part after part.

    Args:
        out: shape [n].
        places: one per rank, shape [k], int32 or int64, each without repetition: so the order of
            every sum is that of the ranks.
        values: one per rank, shape [k].
    """
    for where, what in zip(places, values, strict=True):
        out.index_add_(0, where, what)


def _candidates(vector: Tensor, count: int) -> Tensor:
    """Give, in ascending order, places among which the `count` largest surely are."""
    # An odd step walks through all columns of a matrix whose rows are a power of two long.
    sample = vector[:: max(1, vector.numel() // _SAMPLE) | 1].abs()
    expected = count * sample.numel() / vector.numel()
    position = int(expected + 3 * expected**0.5 + 2)  # three standard deviations low
    while position < sample.numel():
        guess = sample.topk(position, sorted=False).values.min()
        found = _not_below(vector, guess)
        if found.numel() >= count:
            return found
        position *= 2
    return torch.arange(vector.numel(), device=vector.device)


def _not_below(vector: Tensor, limit: Tensor) -> Tensor:
    """Give the places whose magnitude is not less than `limit`; a NaN on either side is not."""
    block = _BLOCK_ELEMENTS if vector.device.type == "cpu" else vector.numel()
    found = []
    for start in range(0, vector.numel(), block):
        part = vector[start : start + block]
        mask = part.abs().lt(limit).logical_not_()
        found.append(mask.nonzero().view(-1).add_(start))
    return torch.cat(found)
