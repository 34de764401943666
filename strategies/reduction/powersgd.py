"""
Send low-rank factors of each gradient matrix (`compression: powersgd`).

Vogels, Karimireddy & Jaggi, NeurIPS 2019; the mathematics is in `algorithms/lowrank.py`. Factors
are sums over the ranks, so two all-reduces carry everything, whatever N is:

    lefts    [ left of W1 | left of W2 | ... | biases and all else that is no large matrix ]
    rights   [ right of W1 | right of W2 | ... ]     kept: the next step begins with them

    left = right M'   --all-reduce-->   left = orthonormal basis
    right = left M    --all-reduce-->   M ~ left' right

A rank's residual is M_i less its own projection on the common basis, which never grows M_i. The
authors' code takes a rank's share of the common result instead; summed over the ranks both are the
same, but there a rank's residual would also hold what the other ranks differ by.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from distplat.strategies.algorithms import lowrank
from distplat.strategies.algorithms.reduce import squared_norm
from distplat.strategies.collective import Collective
from distplat.strategies.reduction.compressed import CompressedReducer
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.laying_out import Slot

_SEED = 20190531
"""Of the first directions: the same on every rank, whatever the job's seed is."""


@dataclass(frozen=True)
class _Matrix:
    """A parameter that is sent as factors."""

    slot: Slot
    shape: tuple[int, int]
    left: Tensor
    """View of `lefts`: [r, rows]."""
    right: Tensor
    """View of `rights`: [r, cols]."""

    def view(self, vector: Tensor) -> Tensor:
        """Give this parameter's part of a flat vector: [rows, cols]."""
        return _part(vector, self.slot).view(self.shape)


class PowerSGDReducer(CompressedReducer):
    """
    Sums rank-r approximations of the gradient's matrices; all else is summed exactly.

    Args:
        flat: see `CompressedReducer`.
        collective: the group.
        rank: of the factors. A matrix for which they would not be smaller is sent as it is.
    """

    def __init__(
        self, flat: FlatModel, collective: Collective, rank: int, *, look: bool = True
    ) -> None:
        super().__init__(flat, collective, look=look)
        shapes = [(slot, lowrank.matrix_shape(slot.shape, rank)) for slot in flat.trained_slots]
        large = [(slot, shape) for slot, shape in shapes if shape is not None]
        self._others = [slot for slot, shape in shapes if shape is None]
        lefts = [rank * rows for _, (rows, _) in large]
        rights = [rank * cols for _, (_, cols) in large]
        others = [slot.size for slot in self._others]
        self._lefts = collective.share(flat.grads.new_empty(sum(lefts + others)))
        self._rights = flat.grads.new_empty(sum(rights))
        if large:
            self._rights = collective.share(self._rights)
        self._rest = self._lefts[sum(lefts) :]
        self._rests = _cut(self._rest, others)
        self._matrices = [
            _Matrix(slot, shape, left.view(rank, -1), right.view(rank, -1))
            for (slot, shape), left, right in zip(
                large, _cut(self._lefts, lefts), _cut(self._rights, rights), strict=True
            )
        ]
        generator = torch.Generator().manual_seed(_SEED)
        for m in self._matrices:
            m.right.copy_(lowrank.starting_factor(rank, m.shape[1], generator))

    def _send(self, meant: Tensor) -> float:
        """See `CompressedReducer`."""
        for m in self._matrices:
            lowrank.left_factor(m.view(meant), m.right, out=m.left)
        for slot, rest in zip(self._others, self._rests, strict=True):
            rest.copy_(_part(meant, slot))
            _part(meant, slot).zero_()
        sent = squared_norm(self._rest)
        self._all_reduce(self._lefts)
        for m in self._matrices:
            lowrank.orthonormalise(m.left)
            lowrank.right_factor(m.view(meant), m.left, out=m.right)
            lowrank.subtract_product(m.view(meant), m.left, m.right)
        sent += squared_norm(self._rights)  # the lefts are orthonormal: the products' norm
        if self._matrices:
            self._all_reduce(self._rights)
        self._write_sum()
        return sent

    def _write_sum(self) -> None:
        """Fill `flat.grads` with what has come of all ranks."""
        grads = self._grads
        for m in self._matrices:
            lowrank.write_product(m.left, m.right, out=m.view(grads))
        for slot, rest in zip(self._others, self._rests, strict=True):
            _part(grads, slot).copy_(rest)


def _part(vector: Tensor, slot: Slot) -> Tensor:
    return vector[slot.offset : slot.stop]


def _cut(vector: Tensor, sizes: list[int]) -> list[Tensor]:
    """Give views of so many elements each, one after the other."""
    stops = list(accumulate(sizes))
    return [vector[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]
