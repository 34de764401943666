"""
Low-rank factors of a matrix by one step of the power method: what PowerSGD sends.

After Vogels, Karimireddy & Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", NeurIPS 2019. With M the sum over ranks of M_i, and Q from the last step:

    P = M Q          each rank M_i Q, then summed           [rows, r]
    P = basis of P   the same on every rank                 [rows, r], orthonormal
    Q = M' P         each rank M_i' P, then summed          [cols, r]
    M ~ P Q'         the best approximation of M whose columns lie in P's span

Factors are kept turned, `left` [r, rows] and `right` [r, cols]: with so few columns the products
run several times faster that way round.
"""

import math

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
