"""What compressed gradients are made of: low-rank factors, and the entries of largest magnitude."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def matrix_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int] | None:
    """
    Give (rows, cols) of a parameter taken as a matrix, or None where factors would save nothing.

    The first dimension makes the rows, all others the columns: a convolution's are its inputs.
    """
    if len(shape) < 2:
        return None
    rows, cols = shape[0], math.prod(shape[1:])
    return (rows, cols) if rank * (rows + cols) < rows * cols else None


def starting_factor(rank: int, cols: int, generator: torch.Generator) -> Tensor:
    """Give random directions to begin with: [rank, cols], float32, normal."""
    return torch.randn(rank, cols, generator=generator)


def left_factor(matrix: Tensor, right: Tensor, out: Tensor) -> None:
    """Write (matrix right')' into `out`: [rows, cols], [r, cols] -> [r, rows]."""
    torch.mm(right, matrix.t(), out=out)


def orthonormalise(left: Tensor) -> None:
    """
    Replace the rows of `left` [r, m], r <= m, by orthonormal ones with the same span, in place.

    By Householder reflections (QR): where rows depend on each other, or are zero, the missing ones
    are made up. So a matrix that was zero in one step does not stay zero for ever.
    """
    exact = left if left.itemsize >= 4 else left.float()  # there is no QR in half precision
    left.copy_(torch.linalg.qr(exact.t()).Q.t())


def right_factor(matrix: Tensor, left: Tensor, out: Tensor) -> None:
    """Write left matrix into `out`: [rows, cols], [r, rows] -> [r, cols]."""
    torch.mm(left, matrix, out=out)


def subtract_product(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Leave in `matrix` [rows, cols] what the factors do not hold of it."""
    matrix.addmm_(left.t(), right, alpha=-1)


def write_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left' right into `out`: [r, rows], [r, cols] -> [rows, cols]."""
    torch.mm(left.t(), right, out=out)


_SAMPLE = 1 << 16
_BLOCK_ELEMENTS = 1 << 17
"""Passes on a CPU go in blocks that stay in a core's cache."""


def entries_sent(density: float, size: int) -> int:
    """Give the number of entries that `density` of a vector of `size` is; at least one."""
    return max(1, round(density * size))


def largest_indices(vector: Tensor, count: int) -> Tensor:
    """
    Give the indices of the `count` entries of largest magnitude, in ascending order.

    Of equal magnitudes the first ones win. NaN counts as infinite: it must travel, so that
    training fails in sight instead of one entry standing still.

    Args:
        vector: shape [n].
        count: from 1 to n.

    Returns:
        Indices, shape [count], int64.
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


def add_sparse(out: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """
    Add entries to `out`, part after part.

    Args:
        out: shape [n].
        indices: one per rank, shape [k], int32 or int64, each without repetition: so the order of
            every sum is that of the ranks.
        values: one per rank, shape [k].
    """
    for where, what in zip(indices, values, strict=True):
        out.index_add_(0, where, what)


def _candidates(vector: Tensor, count: int) -> Tensor:
    """Give, in ascending order, indices among which the `count` largest surely are."""
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
    """Give the indices whose magnitude is not less than `limit`; a NaN on either side is not."""
    block = _BLOCK_ELEMENTS if vector.device.type == "cpu" else vector.numel()
    found = []
    for start in range(0, vector.numel(), block):
        part = vector[start : start + block]
        mask = part.abs().lt(limit).logical_not_()
        found.append(mask.nonzero().view(-1).add_(start))
    return torch.cat(found)
