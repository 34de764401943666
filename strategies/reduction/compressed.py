"""Compressed all-reduce with error feedback: top-k entries or low-rank factors (PowerSGD)."""

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
from distplat.strategies.model.parameter_layout import Slot, scale_in_place
from distplat.strategies.reduction.base import (
    ControlSum,
    Meter,
    Reducer,
    mixed_dtypes_error,
    time_all_reduce,
)


class CompressedReducer(Reducer):
    """
    A `Reducer` that sends compressed gradients, all at once after backward.

    Needs two more vectors of the gradients' size. With one rank nothing is compressed or sent.

    Args:
        flat: its gradients are set to zero: an all-reduce of them is timed here, as a baseline.
        collective: the group; construction is a collective operation.
        check_finite: check the gradients for NaN and infinity before they are exchanged.

    Raises:
        SpecError: the parameters have several dtypes.
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
        """Error feedback: the part of the gradients that this rank has not sent yet, in the scale
        of applied gradients; shape [n]."""
        self._target = torch.zeros_like(self._grads)
        self._alone = collective.world == 1
        sent, _ = traffic_elements(self._grads.numel(), collective.rank, collective.world)
        self._plain_bytes = sent * flat.grads.itemsize
        self._exchange_s = 0.0
        self._baseline_s = 0.0 if self._alone else time_all_reduce(self._grads, collective)
        self._step, self._sending = Meter(collective), Meter(collective)
        self._figures: dict[str, float] = {}

    @abstractmethod
    def _send(self, target: Tensor) -> float:
        """
        Write the sum of all ranks' compressed gradients into `flat.grads`.

        Args:
            target: shape [n], gradient plus residual; the part that is sent is subtracted.

        Returns:
            The squared 2-norm of the part that this rank sent.
        """

    @override
    def finish(self, local: StepControl) -> StepControl:
        """The control record is summed first: nothing is sent in a step that is not finite, so
        residuals stay unchanged.
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
        self._exchange_s, began = 0.0, time.perf_counter()
        error_norm = self._exchange(total)
        seconds = time.perf_counter() - began
        lap = self._sending.lap()
        self._figures = {
            "exposed_s": self._exchange_s,
            "saved_bytes": self._plain_bytes - lap["sent_bytes"],
            "compress_s": seconds - self._exchange_s,
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
        Take over the residual of an earlier group's reducer of the same model.

        Not all ranks need to do so: a new worker has no residual.
        """
        self.residual.copy_(old.residual)

    def _exchange(self, total: StepControl) -> float:
        """
        Exchange with error feedback; return |residual| / |target|, 2-norms.

        The residual is kept in the scale of the applied gradient, which differs from that of
        `flat.grads` by a factor that may change with each step. A parameter without a gradient on
        any rank is not updated in this step, so nothing of its residual is sent.

        Args:
            total: sum of all ranks' control records.
        """
        target, residual, scale = self._target, self.residual, total.scale
        torch.add(self._grads, residual, alpha=1.0 / scale, out=target)
        pairs = zip(self._flat.trained_slots, total.present, strict=False)
        absent = [slot for slot, is_present in pairs if not is_present]
        for slot in absent:
            _part(target, slot).zero_()
        sent = self._send(target) * scale**2
        scale_in_place([target], scale)
        for slot in absent:
            _part(target, slot).copy_(_part(residual, slot))
        self.residual, self._target = target, residual
        left = squared_norm(self.residual)
        # Both schemes send a part that is orthogonal to the residual, so the squares add up.
        return float((left / (left + sent)) ** 0.5) if left else 0.0

    def _all_reduce(self, tensor: Tensor) -> None:
        """All-reduce, timed."""
        began = time.perf_counter()
        self._collective.all_reduce(tensor)
        self._exchange_s += time.perf_counter() - began

    def _all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """All-gather, timed."""
        began = time.perf_counter()
        self._collective.all_gather(outputs, tensor)
        self._exchange_s += time.perf_counter() - began


_MOST_ELEMENTS = torch.iinfo(torch.int32).max


class TopKReducer(CompressedReducer):
    """
    Sums the `density * n` largest entries of each rank's gradient of n entries.

    Args:
        flat: see `CompressedReducer`.
        collective: the group.
        density: fraction of the entries to send, above 0 and up to 1; at least one entry.
        check_finite: see `CompressedReducer`.

    Raises:
        ValueError: the model has more parameters than int32 can index.
    """

    def __init__(
        self, flat: FlatModel, collective: Collective, density: float, *, check_finite: bool = True
    ) -> None:
        if flat.layout.tail > _MOST_ELEMENTS:
            raise ValueError(f"topk sends indices as int32: at most {_MOST_ELEMENTS} parameters")
        super().__init__(flat, collective, check_finite=check_finite)
        self._count = entries_sent(density, flat.layout.tail)
        # One message per rank, [values | indices], as int32 words for any dtype of the values.
        words = _words(self._count, flat.grads.dtype) + self._count
        self._messages = [
            torch.zeros(words, dtype=torch.int32, device=flat.grads.device)
            for _ in range(collective.world)
        ]

    @override
    def _send(self, target: Tensor) -> float:
        top = largest_indices(target, self._count)
        message = self._messages[self._collective.rank]
        self._values(message).copy_(target[top])
        self._indices(message).copy_(top)
        sent = squared_norm(self._values(message))
        self._all_gather(self._messages, message)
        grads = self._grads.zero_()
        indices = [self._indices(message) for message in self._messages]
        add_sparse(grads, indices, [self._values(message) for message in self._messages])
        target.index_fill_(0, top, 0.0)
        return sent

    def _values(self, message: Tensor) -> Tensor:
        dtype = self._grads.dtype
        return message[: _words(self._count, dtype)].view(dtype)[: self._count]

    def _indices(self, message: Tensor) -> Tensor:
        return message[-self._count :]


def _words(count: int, dtype: torch.dtype) -> int:
    """Return the number of int32 words that hold `count` values."""
    return -(-count * dtype.itemsize // 4)


_SEED = 20190531
"""Seed of the initial factors: the same on every rank, independent of the job's seed."""


@dataclass(frozen=True)
class _Matrix:
    """A parameter whose gradient is sent as two factors."""

    slot: Slot
    shape: tuple[int, int]
    left: Tensor
    """View of `lefts`: [r, rows]."""
    right: Tensor
    """View of `rights`: [r, cols]."""

    def view(self, vector: Tensor) -> Tensor:
        """Return the view of this parameter in a flat vector: [rows, cols]."""
        return _part(vector, self.slot).view(self.shape)


class PowerSGDReducer(CompressedReducer):
    """
    Sums rank-r approximations of gradient matrices; other gradients are summed exactly.

    Args:
        flat: see `CompressedReducer`.
        collective: the group.
        rank: of the factors. A matrix that is not larger than its factors is sent as it is.
    """

    def __init__(
        self, flat: FlatModel, collective: Collective, rank: int, *, check_finite: bool = True
    ) -> None:
        super().__init__(flat, collective, check_finite=check_finite)
        shapes = [(slot, compression.matrix_shape(slot.shape, rank)) for slot in flat.trained_slots]
        large = [(slot, shape) for slot, shape in shapes if shape is not None]
        self._plain_slots = [slot for slot, shape in shapes if shape is None]
        lefts = [rank * rows for _, (rows, _) in large]
        rights = [rank * cols for _, (_, cols) in large]
        plain = [slot.size for slot in self._plain_slots]
        self._lefts = collective.share(flat.grads.new_empty(sum(lefts + plain)))
        self._rights = flat.grads.new_empty(sum(rights))
        if large:
            self._rights = collective.share(self._rights)
        self._plain = self._lefts[sum(lefts) :]
        self._plain_parts = _cut(self._plain, plain)
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
    def _send(self, target: Tensor) -> float:
        for m in self._matrices:
            compression.left_factor(m.view(target), m.right, out=m.left)
        for slot, rest in zip(self._plain_slots, self._plain_parts, strict=True):
            rest.copy_(_part(target, slot))
            _part(target, slot).zero_()
        sent = squared_norm(self._plain)
        self._all_reduce(self._lefts)
        for m in self._matrices:
            compression.orthonormalise(m.left)
            compression.right_factor(m.view(target), m.left, out=m.right)
            compression.subtract_product(m.view(target), m.left, m.right)
        sent += squared_norm(
            self._rights
        )  # the norm of the products, as left factors are orthonormal
        if self._matrices:
            self._all_reduce(self._rights)
        self._write_sum()
        return sent

    def _write_sum(self) -> None:
        """Write the reduced gradients into `flat.grads`."""
        grads = self._grads
        for m in self._matrices:
            compression.write_product(m.left, m.right, out=m.view(grads))
        for slot, rest in zip(self._plain_slots, self._plain_parts, strict=True):
            _part(grads, slot).copy_(rest)


def _part(vector: Tensor, slot: Slot) -> Tensor:
    return vector[slot.offset : slot.stop]


def _cut(vector: Tensor, sizes: list[int]) -> list[Tensor]:
    """Return consecutive views of the given sizes."""
    stops = list(accumulate(sizes))
    return [vector[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]
