"""
A server's part of an embedding table: index, rows, optimizer state, and undo of the last update.

                 index            rows             states
    id 904 ──▶   slot 2   ──▶   [ . . . . ]      [ . . . . ]
                                one line per slot, in the order in which rows were created

A row is created by its first gradient. A read of a missing row returns its initial values, which
are a pure function of seed and id, and stores nothing: evaluations have no side effects.

Update rules are torch's optimizers for sparse gradients, and row-wise Adagrad. An update changes
only the rows of the step and their states, as torch does for `nn.Embedding(sparse=True)` under SGD,
Adagrad and SparseAdam, up to rounding. Only SparseAdam counts steps; as in torch, it counts the
steps in which the table had a gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplat.platform.model_options import (
    AnyRowOptimizer,
    RowAdagrad,
    RowSGD,
    RowSparseAdam,
    RowWiseAdagrad,
)
from distplat.platform.shard_map import TableSpec
from distplat.strategies.sparse.rows import Rows, build_index, initial_rows

Block = NDArray[np.float32]


Update = Callable[[Block, Sequence[Block], Block, float, int], None]
"""
Updates rows and their states in place, and must not change the gradient. Arguments:

    rows       shape [n, width]
    states     one of shape [n, its width] for each name
    gradient   shape [n, width]
    rate       learning rate of the step
    step       number of earlier updates of the table, not steps of the run
"""


@dataclass(frozen=True)
class RowRule:
    """An optimizer of rows."""

    update: Update
    states: Mapping[str, float] = field(default_factory=dict)
    """Initial value of each state of a row, by torch's name."""
    per_row: bool = False
    """Whether a state is one number per row; otherwise it has the row's width."""


def build_rule(options: AnyRowOptimizer) -> RowRule:
    """Build the update rule of a job's options."""
    match options:
        case RowSGD():
            return RowRule(_sgd)
        case RowAdagrad():
            return RowRule(partial(_adagrad, options), {"sum": options.initial_accumulator_value})
        case RowWiseAdagrad():
            first = {"sum": options.initial_accumulator_value}
            return RowRule(partial(_adagrad, options), first, per_row=True)
        case RowSparseAdam():
            return RowRule(partial(_sparse_adam, options), {"exp_avg": 0.0, "exp_avg_sq": 0.0})


def _sgd(rows: Block, states: Sequence[Block], gradient: Block, rate: float, step: int) -> None:
    rows -= np.float32(rate) * gradient


def _adagrad(
    options: RowAdagrad | RowWiseAdagrad,
    rows: Block,
    states: Sequence[Block],
    gradient: Block,
    rate: float,
    step: int,
) -> None:
    (sums,) = states
    if isinstance(options, RowWiseAdagrad):
        sums += np.square(gradient).mean(axis=1, keepdims=True)
    else:
        sums += gradient * gradient
    rows -= np.float32(rate) * gradient / (np.sqrt(sums) + np.float32(options.eps))


def _sparse_adam(
    options: RowSparseAdam,
    rows: Block,
    states: Sequence[Block],
    gradient: Block,
    rate: float,
    step: int,
) -> None:
    mean, square = states
    first, second = options.betas
    mean += np.float32(1 - first) * (gradient - mean)
    square += np.float32(1 - second) * (gradient * gradient - square)
    corrected = rate * (1 - second ** (step + 1)) ** 0.5 / (1 - first ** (step + 1))
    rows -= np.float32(corrected) * mean / (np.sqrt(square) + np.float32(options.eps))


_BLOCK_BYTES = 1 << 17
"""Size of a block of updated rows, which stays in the core's cache from read to write."""

Ids = NDArray[np.int64]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class RowGradients:
    """Gradients of rows of a table."""

    table: int
    """Number of the table in the plan."""
    ids: Ids
    """Shape [n]; unique."""
    values: Values
    """Shape [n, width]."""


class Table:
    """
    Rows of a table with their optimizer state.

    Args:
        spec: of the table.
        seed: of the job.
        rule: update rule of the rows.
        rewinds: save the values that an update changes, so that `rewind` can undo it.
    """

    def __init__(self, spec: TableSpec, seed: int, rule: RowRule, *, rewinds: bool = False) -> None:
        self.spec, self._seed, self._rule = spec, seed, rule
        self.updates = 0  #: steps in which any rank used the table; torch's `step` of a parameter
        self._index = build_index(spec.rows)
        width = 1 if rule.per_row else spec.width
        states = [Rows(width, first) for first in rule.states.values()]
        self._arrays = [Rows(spec.width), *states]
        self._columns = ("rows", *rule.states)
        self._sum_positions = np.zeros(0, np.int64)  #: by slot: 1 + its index in the current sum
        self._block = max(1, _BLOCK_BYTES // (4 * spec.width))
        self._sorted = np.zeros(0, np.int64)
        self._rewinds = rewinds
        self._saved_rows: list[Rows] = []
        self._saved_slots: NDArray[np.int64] | None = None  #: slots of the rows in `_saved_rows`

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._index)

    @property
    def state_bytes(self) -> int:
        """Size of rows and optimizer state in bytes."""
        return sum(array.array.nbytes for array in self._arrays)

    def create(self, ids: Ids) -> None:
        """Create the rows of unique ids; existing rows are unchanged."""
        self._slots(ids)

    def put(self, ids: Ids, values: Values) -> None:
        """Set rows, shape [n, width], from a saved table."""
        slots = self._slots(ids)  # first, because it may move the array
        self._arrays[0].put(slots, values)

    def copy(self) -> dict[str, Ids | Values]:
        """Copy the table: `ids` in the order of creation, `rows`, and states by name."""
        columns = zip(self._columns, self._arrays, strict=True)
        return {"ids": self._index.ids.copy(), **{name: a.array.copy() for name, a in columns}}

    def snapshot(self) -> dict[str, Any]:
        """Copy everything that `load` needs for an equal table, including the undo data."""
        before = self._saved_slots
        kept = (
            []
            if before is None
            else [rows.array[: len(before)].copy() for rows in self._saved_rows]
        )
        return {"columns": self.copy(), "updates": self.updates, "before": before, "kept": kept}

    def load(self, snapshot: Mapping[str, Any]) -> None:
        """Load the `snapshot` of another table into this empty one."""
        columns = dict(snapshot["columns"])
        self.restore(columns.pop("ids"), columns)
        self.updates, self._saved_slots = snapshot["updates"], snapshot["before"]
        if self._saved_slots is not None:
            for rows, kept in zip(
                self._rows_for_undo(len(self._saved_slots)), snapshot["kept"], strict=True
            ):
                rows.array[: len(kept)] = kept

    def restore(self, ids: Ids, columns: Mapping[str, Values]) -> None:
        """
        Set rows and their states.

        Args:
            ids: shape [n], unique.
            columns: `rows` and states by name, as in `copy`.

        Raises:
            KeyError: a state is missing.
        """
        slots = self._slots(ids)
        for name, rows in zip(self._columns, self._arrays, strict=True):
            rows.put(slots, columns[name])

    def read(self, ids: Ids, out: Values) -> None:
        """
        Write the rows of `ids`, shape [n], into `out`, shape [n, width].

        Ids may repeat. Missing rows have their initial values.
        """
        slots = self._index.find(ids)
        rows = self._arrays[0].array
        new = np.flatnonzero(slots < 0)
        if len(rows):
            # `clip` avoids a buffer in numpy; rows of missing ids are overwritten below.
            np.take(rows, slots, axis=0, out=out, mode="clip")
        if len(new):
            out[new] = initial_rows(self.spec, self._seed, ids[new])

    @np.errstate(over="ignore", invalid="ignore")  # torch does not warn of NaN and infinity either
    def apply(self, parts: Sequence[RowGradients], rate: float) -> None:
        """
        Update the rows that have gradients.

        Args:
            parts: one for each rank that used the table; they are summed in rank order. An update
                without rows counts as well: the rows are on other servers, or there are none, like
                an empty sparse gradient in torch.
            rate: learning rate.
        """
        self.forget()
        slots, gradient = self._sum_gradients(parts)
        saved = [rows.array[: len(slots)] for rows in self._rows_for_undo(len(slots))]
        arrays = [rows.array for rows in self._arrays]
        for first in range(0, len(slots), self._block):
            part = slice(first, first + self._block)
            old = [array.take(slots[part], axis=0) for array in arrays]
            for saved_rows, block in zip(saved, old, strict=False):
                saved_rows[part] = block
            self._rule.update(old[0], old[1:], gradient[part], rate, self.updates)
            for rows, block in zip(self._arrays, old, strict=True):
                rows.put(slots[part], block)
        self.updates += 1
        if self._rewinds:
            self._saved_slots = slots

    def summed(self, parts: Sequence[RowGradients]) -> RowGradients:
        """Sum gradients as `apply` does; the sum has the same effect as all parts."""
        used = [part for part in parts if len(part.ids)]
        if len(used) <= 1:
            return (used or parts)[0]
        slots, values = self._sum_gradients(used)
        return RowGradients(parts[0].table, self._index.ids[slots], values)

    def forget(self) -> None:
        """Discard the undo data of the last update."""
        self._saved_slots = None

    def rewind(self) -> None:
        """Undo the last update exactly; rows that it created keep their initial values."""
        if self._saved_slots is not None:
            for rows, kept in zip(self._arrays, self._saved_rows, strict=True):
                rows.put(self._saved_slots, kept.array[: len(self._saved_slots)])
            self.updates -= 1
            self._saved_slots = None

    def ids(self) -> Ids:
        """Return the ids of all rows in ascending order, shape [len]."""
        if len(self._sorted) != len(self):
            self._sorted = np.sort(self._index.ids)
        return self._sorted

    def _rows_for_undo(self, count: int) -> list[Rows]:
        """Return reusable memory for the values that an update changes; empty without `rewinds`."""
        if self._rewinds:
            self._saved_rows = self._saved_rows or [Rows(rows.width) for rows in self._arrays]
            for rows in self._saved_rows:
                rows.grow(max(count, len(rows.array)))
        return self._saved_rows

    def _slots(self, ids: Ids) -> NDArray[np.int64]:
        """Return the slots of rows, after creating missing rows."""
        slots = self._index.find(ids)
        new = np.flatnonzero(slots < 0)
        if len(new):
            slots[new] = self._index.add(ids[new])
            for rows in self._arrays:
                rows.grow(len(self._index))
            self._arrays[0].array[slots[new]] = initial_rows(self.spec, self._seed, ids[new])
        return slots

    def _sum_gradients(self, parts: Sequence[RowGradients]) -> tuple[NDArray[np.int64], Values]:
        """Return unique slots and the sums of their gradients, in rank order (I2)."""
        parts = [part for part in parts if len(part.ids)] or parts[:1]
        slots_by_part = [self._slots(part.ids) for part in parts]
        if len(parts) == 1:
            return slots_by_part[0], parts[0].values
        if len(self._sum_positions) < len(self):
            self._sum_positions = np.zeros(len(self) * 5 // 4, np.int64)
        slots = np.empty(sum(map(len, slots_by_part)), np.int64)
        sums, count = np.empty((len(slots), self.spec.width), np.float32), 0
        for part_slots, part in zip(slots_by_part, parts, strict=True):
            positions = self._sum_positions[part_slots] - 1
            new = positions < 0
            more = slice(count, count + int(new.sum()))
            slots[more], sums[more] = part_slots[new], part.values[new]
            self._sum_positions[part_slots[new]] = np.arange(more.start, more.stop) + 1
            sums[positions[~new]] += part.values[~new]
            count = more.stop
        self._sum_positions[slots[:count]] = 0
        return slots[:count], sums[:count]
