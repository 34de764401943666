"""Lossy ways to sum gradients, with error feedback: the largest entries, or low-rank factors."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from typing_extensions import override

from distplat.strategies.algorithms import compression
from distplat.strategies.algorithms.compression import add_sparse, entries_sent, largest_indices
from distplat.strategies.algorithms.reduce import squared_norm, traffic_elements
from distplat.strategies.collective import Collective
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.parameter_layout import Slot
from distplat.strategies.reduction.base import (
    ControlSum,
    Meter,
    Reducer,
    mixed_dtypes_error,
    time_all_reduce,
)


class CompressedReducer(Reducer):
    """
    A `Reducer` that sends less than the gradients, all at once when they are there.

    Takes two more vectors of the gradients' size. Alone in its group it does nothing at all.

    Args:
        flat: its gradients are set to zero: an all-reduce of them is timed here, as a baseline.
        collective: the group; every rank makes its reducer at the same time.
        check_finite: look for NaN and infinity in the gradients before they are exchanged.

    Raises:
        SpecError: the parameters are of several types.
    """

    def __init__(
        self, flat: FlatModel, collective: Collective, *, check_finite: bool = True
    ) -> None:
        if flat.mixed:
            raise mixed_dtypes_error(flat.layout)
        self._flat, self._collective, self._check_finite = flat, collective, check_finite
        self._control = ControlSum(collective, len(flat.slots), flat.grads.device)
        self._grads = flat.grads[: flat.layout.tail]
        self.residual = torch.zeros_like(self._grads)
        """What this rank has not sent yet: shape [n]."""
        self._meant = torch.zeros_like(self._grads)
        self._alone = collective.world == 1
        sent, _ = traffic_elements(self._grads.numel(), collective.rank, collective.world)
        self._plain_bytes = sent * flat.grads.itemsize
        self._travel_s = 0.0
        self._baseline_s = 0.0 if self._alone else time_all_reduce(self._grads, collective)
        self._step, self._sending = Meter(collective), Meter(collective)
        self._figures: dict[str, float] = {}

    @abstractmethod
    def _send(self, meant: Tensor) -> float:
        """
        Write the sum over ranks of what is sent into `flat.grads`; take this rank's out of `meant`.

        Args:
            meant: shape [n]; left is what was not sent.

        Returns:
            The squared 2-norm of what this rank sent.
        """

    @override
    def finish(self, local: StepControl) -> StepControl:
        """The control record goes first: of a step that is not finite nothing is sent, so residuals
        stay as they are.
        """
        local = local.looked_at(self._flat) if self._check_finite else local
        if self._alone:
            return local
        self._step.begin()
        self._control.start(local)
        total = self._control.wait()
        if self._check_finite and not total.finite:
            return total
        self._sending.lap()
        self._travel_s, began = 0.0, time.perf_counter()
        error_norm = self._exchange()
        seconds = time.perf_counter() - began
        lap = self._sending.lap()
        self._figures = {
            "exposed_s": self._travel_s,
            "saved_bytes": self._plain_bytes - lap["sent_bytes"],
            "compress_s": seconds - self._travel_s,
            "baseline_s": self._baseline_s,
            "saved_s": self._baseline_s - (seconds - lap["waiting_s"]),
            "error_norm": error_norm,
        }
        return total

    @override
    def figures(self) -> dict[str, float]:
        return {**self._step.lap(), **self._figures}

    def inherit(self, old: "CompressedReducer") -> None:
        """
        Go on with the residual of a reducer of the same model that an earlier group had.

        Ranks need not all do so: a new worker has none.
        """
        self.residual.copy_(old.residual)

    def _exchange(self) -> float:
        """Exchange with error feedback; give |not sent| / |meant|, 2-norms."""
        torch.add(self.residual, self._grads, out=self._meant)
        sent = self._send(self._meant)
        self.residual, self._meant = self._meant, self.residual
        left = squared_norm(self.residual)
        # Both schemes send a part that is orthogonal to the rest, so the squares add up.
        return float((left / (left + sent)) ** 0.5) if left else 0.0

    def _all_reduce(self, tensor: Tensor) -> None:
        """Sum over the group, on the clock."""
        began = time.perf_counter()
        self._collective.all_reduce(tensor)
        self._travel_s += time.perf_counter() - began

    def _all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """Collect from the group, on the clock."""
        began = time.perf_counter()
        self._collective.all_gather(outputs, tensor)
        self._travel_s += time.perf_counter() - began


_MOST_ELEMENTS = torch.iinfo(torch.int32).max


class TopKReducer(CompressedReducer):
    """
    Sums the `density * n` largest entries of each rank's gradient of n entries.

    Args:
        flat: see `CompressedReducer`.
        collective: the group.
        density: part of the entries that is sent, above 0 and up to 1; at least one entry is.
        check_finite: see `CompressedReducer`.

    Raises:
        ValueError: the model has more parameters than an int32 can number.
    """

    def __init__(
        self, flat: FlatModel, collective: Collective, density: float, *, check_finite: bool = True
    ) -> None:
        if flat.layout.tail > _MOST_ELEMENTS:
            raise ValueError(f"topk sends indices as int32: at most {_MOST_ELEMENTS} parameters")
        super().__init__(flat, collective, check_finite=check_finite)
        self._count = entries_sent(density, flat.layout.tail)
        # One message per rank, [values | indices], in words of 4 bytes whatever the values' dtype.
        words = _words(self._count, flat.grads.dtype) + self._count
        self._wires = [
            torch.zeros(words, dtype=torch.int32, device=flat.grads.device)
            for _ in range(collective.world)
        ]

    @override
    def _send(self, meant: Tensor) -> float:
        chosen = largest_indices(meant, self._count)
        own_wire = self._wires[self._collective.rank]
        self._values(own_wire).copy_(meant[chosen])
        self._indices(own_wire).copy_(chosen)
        sent = squared_norm(self._values(own_wire))
        self._all_gather(self._wires, own_wire)
        grads = self._grads.zero_()
        indices = [self._indices(wire) for wire in self._wires]
        add_sparse(grads, indices, [self._values(wire) for wire in self._wires])
        meant.index_fill_(0, chosen, 0.0)
        return sent

    def _values(self, wire: Tensor) -> Tensor:
        dtype = self._grads.dtype
        return wire[: _words(self._count, dtype)].view(dtype)[: self._count]

    def _indices(self, wire: Tensor) -> Tensor:
        return wire[-self._count :]


def _words(count: int, dtype: torch.dtype) -> int:
    """Give the int32 words that so many values fill."""
    return -(-count * dtype.itemsize // 4)


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
        self, flat: FlatModel, collective: Collective, rank: int, *, check_finite: bool = True
    ) -> None:
        super().__init__(flat, collective, check_finite=check_finite)
        shapes = [(slot, compression.matrix_shape(slot.shape, rank)) for slot in flat.trained_slots]
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
            m.right.copy_(compression.starting_factor(rank, m.shape[1], generator))

    @override
    def _send(self, meant: Tensor) -> float:
        for m in self._matrices:
            compression.left_factor(m.view(meant), m.right, out=m.left)
        for slot, rest in zip(self._others, self._rests, strict=True):
            rest.copy_(_part(meant, slot))
            _part(meant, slot).zero_()
        sent = squared_norm(self._rest)
        self._all_reduce(self._lefts)
        for m in self._matrices:
            compression.orthonormalise(m.left)
            compression.right_factor(m.view(meant), m.left, out=m.right)
            compression.subtract_product(m.view(meant), m.left, m.right)
        sent += squared_norm(self._rights)  # the lefts are orthonormal: the products' norm
        if self._matrices:
            self._all_reduce(self._rights)
        self._write_sum()
        return sent

    def _write_sum(self) -> None:
        """Fill `flat.grads` with what has come of all ranks."""
        grads = self._grads
        for m in self._matrices:
            compression.write_product(m.left, m.right, out=m.view(grads))
        for slot, rest in zip(self._others, self._rests, strict=True):
            _part(grads, slot).copy_(rest)


def _part(vector: Tensor, slot: Slot) -> Tensor:
    return vector[slot.offset : slot.stop]


def _cut(vector: Tensor, sizes: list[int]) -> list[Tensor]:
    """Give views of so many elements each, one after the other."""
    stops = list(accumulate(sizes))
    return [vector[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]
