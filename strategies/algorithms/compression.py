"""Gradient compression: low-rank factors (PowerSGD) and entries of largest magnitude (top-k)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def matrix_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int] | None:
    """
    Return (rows, cols) of a parameter as a matrix, or None if factors are not smaller.

    The first dimension becomes the rows, all others the columns.
    """
    if len(shape) < 2:
        return None
    rows, cols = shape[0], math.prod(shape[1:])
    return (rows, cols) if rank * (rows + cols) < rows * cols else None


def starting_factor(rank: int, cols: int, generator: torch.Generator) -> Tensor:
    """Return an initial right factor: [rank, cols], float32, normal."""
    return torch.randn(rank, cols, generator=generator)


def left_factor(matrix: Tensor, right: Tensor, out: Tensor) -> None:
    """Write (matrix right')' into `out`: [rows, cols], [r, cols] -> [r, rows]."""
    torch.mm(right, matrix.t(), out=out)


def orthonormalise(left: Tensor) -> None:
    """
    Replace the rows of `left` [r, m], r <= m, by orthonormal ones with the same span, in place.

    QR by Householder reflections completes the basis if rows are dependent or zero, so a matrix
    that was zero in one step does not stay zero.
    """
    exact = left if left.itemsize >= 4 else left.float()  # torch has no QR in half precision
    left.copy_(torch.linalg.qr(exact.t()).Q.t())


def right_factor(matrix: Tensor, left: Tensor, out: Tensor) -> None:
    """Write left matrix into `out`: [rows, cols], [r, rows] -> [r, cols]."""
    torch.mm(left, matrix, out=out)


def subtract_product(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract left' right from `matrix` [rows, cols], in place."""
    matrix.addmm_(left.t(), right, alpha=-1)


def write_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left' right into `out`: [r, rows], [r, cols] -> [rows, cols]."""
    torch.mm(left.t(), right, out=out)


_SAMPLE = 1 << 16
_BLOCK_ELEMENTS = 1 << 17
"""Block size of passes on a CPU: a block fits into a core's cache."""


def entries_sent(density: float, size: int) -> int:
    """Return the number of entries to send of a vector of `size`; at least one."""
    return max(1, round(density * size))


def largest_indices(vector: Tensor, count: int) -> Tensor:
    """
    Return the indices of the `count` entries of largest magnitude, in ascending order.

    Among equal magnitudes the first entries win. NaN counts as infinite, so that it is sent and
    training fails visibly instead of one entry never being updated.

    Args:
        vector: shape [n].
        count: from 1 to n.

    Returns:
        Indices, shape [count], int64.
    """
    if count == vector.numel():
        return torch.arange(count, device=vector.device)
    candidates = _candidates(vector, count)
    magnitudes = vector[candidates].abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    threshold = magnitudes.topk(count, sorted=False).values.min()
    mask = magnitudes > threshold
    ties = (magnitudes == threshold).nonzero().view(-1)
    mask[ties[: count - int(mask.sum())]] = True
    return candidates[mask]


def add_sparse(out: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """
    Add sparse entries to `out`, in rank order.

    Args:
        out: shape [n].
        indices: one per rank, shape [k], int32 or int64, without duplicates, so that every sum is
            computed in rank order.
        values: one per rank, shape [k].
    """
    for rank_indices, rank_values in zip(indices, values, strict=True):
        out.index_add_(0, rank_indices, rank_values)


def _candidates(vector: Tensor, count: int) -> Tensor:
    """Return, in ascending order, indices that include those of the `count` largest entries."""
    # An odd step visits all columns of a matrix whose row length is a power of two.
    sample = vector[:: max(1, vector.numel() // _SAMPLE) | 1].abs()
    expected = count * sample.numel() / vector.numel()
    position = int(expected + 3 * expected**0.5 + 2)  # three standard deviations low
    while position < sample.numel():
        threshold = sample.topk(position, sorted=False).values.min()
        found = _not_below(vector, threshold)
        if found.numel() >= count:
            return found
        position *= 2
    return torch.arange(vector.numel(), device=vector.device)


def _not_below(vector: Tensor, limit: Tensor) -> Tensor:
    """Return the indices of magnitudes not less than `limit`, including comparisons with NaN."""
    block = _BLOCK_ELEMENTS if vector.device.type == "cpu" else vector.numel()
    found = []
    for start in range(0, vector.numel(), block):
        part = vector[start : start + block]
        mask = part.abs().lt(limit).logical_not_()
        found.append(mask.nonzero().view(-1).add_(start))
    return torch.cat(found)
