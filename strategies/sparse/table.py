"""
One server's part of one embedding table: index, rows, optimizer state, and the way back by a step.

                 index            rows             states
    id 904 ──▶   slot 2   ──▶   [ . . . . ]      [ . . . . ]
                                one line per slot, in the order in which rows came

A row comes into being with its first gradient. Whoever reads one before gets its first values,
which are a pure function of seed and id, and nothing is stored: evaluations leave no trace.

Update rules are torch's optimizers as they treat sparse gradients, and row-wise Adagrad. Only the
rows of a step and their states are touched: what torch does for an `nn.Embedding(sparse=True)`
under SGD, Adagrad and SparseAdam, up to rounding. SparseAdam alone counts steps, and as torch does
it counts the table's: those in which it had a gradient.
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
from distplat.strategies.sparse.rows import Rows, initial_rows, make_index

Block = NDArray[np.float32]


Update = Callable[[Block, Sequence[Block], Block, float, int], None]
"""
Updates rows and their states in place; the gradient is not ours and stays as it is. It gets:

    rows       shape [n, width]
    states     one of shape [n, its width] for each name
    gradient   shape [n, width]
    rate       learning rate of the step
    step       updates that the table has behind it, not steps of the run
"""


@dataclass(frozen=True)
class RowRule:
    """An optimizer of rows."""

    update: Update
    states: Mapping[str, float] = field(default_factory=dict)
    """First value of each state that a row has, by torch's name."""
    per_row: bool = False
    """Whether a state is one number for each row, else of the row's width."""


def make_rule(options: AnyRowOptimizer) -> RowRule:
    """Make the rule that a job names."""
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
"""Rows that are updated at a time: what was read is still in a core's cache when it is written."""

Ids = NDArray[np.int64]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class RowGradients:
    """Gradients of some rows of one table."""

    table: int
    """Its number in the plan."""
    ids: Ids
    """Shape [n]; each once."""
    values: Values
    """Shape [n, width]."""


class Table:
    """
    Rows of one table and all that belongs to them.

    Args:
        spec: of the table.
        seed: of the job.
        rule: how rows are updated.
        rewinds: keep what an update changes, so that `rewind` can take it back.
    """

    def __init__(self, spec: TableSpec, seed: int, rule: RowRule, *, rewinds: bool = False) -> None:
        self.spec, self._seed, self._rule = spec, seed, rule
        self.updates = 0  #: steps in which some rank used the table, torch's `step` of a parameter
        self._index = make_index(spec.rows)
        width = 1 if rule.per_row else spec.width
        states = [Rows(width, first) for first in rule.states.values()]
        self._arrays = [Rows(spec.width), *states]
        self._columns = ("rows", *rule.states)
        self._summed = np.zeros(0, np.int64)  #: by slot: 1 + its index in the sum being made
        self._block = max(1, _BLOCK_BYTES // (4 * spec.width))
        self._sorted = np.zeros(0, np.int64)
        self._rewinds = rewinds
        self._kept: list[Rows] = []
        self._before: NDArray[np.int64] | None = None  #: slots of what `_kept` holds

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._index)

    @property
    def state_bytes(self) -> int:
        """Memory of rows and optimizer state."""
        return sum(array.array.nbytes for array in self._arrays)

    def create(self, ids: Ids) -> None:
        """Have these rows, each named once; those that are there stay as they are."""
        self._slots(ids)

    def put(self, ids: Ids, values: Values) -> None:
        """Set rows, shape [n, width], from a saved table."""
        slots = self._slots(ids)  # first: the array may move
        self._arrays[0].put(slots, values)

    def copy(self) -> dict[str, Ids | Values]:
        """Copy all of it: `ids` in the order in which they came, `rows`, and states by name."""
        held = zip(self._columns, self._arrays, strict=True)
        return {"ids": self._index.ids.copy(), **{name: a.array.copy() for name, a in held}}

    def snapshot(self) -> dict[str, Any]:
        """Copy all that `load` makes an equal table of, the way back included."""
        before = self._before
        kept = [] if before is None else [rows.array[: len(before)].copy() for rows in self._kept]
        return {"columns": self.copy(), "updates": self.updates, "before": before, "kept": kept}

    def load(self, snapshot: Mapping[str, Any]) -> None:
        """Take over the state of a `snapshot` of another table; this one is empty."""
        columns = dict(snapshot["columns"])
        self.restore(columns.pop("ids"), columns)
        self.updates, self._before = snapshot["updates"], snapshot["before"]
        if self._before is not None:
            for rows, kept in zip(
                self._room_to_keep(len(self._before)), snapshot["kept"], strict=True
            ):
                rows.array[: len(kept)] = kept

    def restore(self, ids: Ids, columns: Mapping[str, Values]) -> None:
        """
        Set rows and their states.

        Args:
            ids: shape [n], each once.
            columns: `rows` and states by name, as `copy` gives them.

        Raises:
            KeyError: a state is missing.
        """
        slots = self._slots(ids)
        for name, rows in zip(self._columns, self._arrays, strict=True):
            rows.put(slots, columns[name])

    def read(self, ids: Ids, out: Values) -> None:
        """
        Write the rows of `ids`, shape [n], into `out`, shape [n, width].

        Ids may come more than once. Rows that do not exist have their first values.
        """
        slots = self._index.find(ids)
        rows = self._arrays[0].array
        new = np.flatnonzero(slots < 0)
        if len(rows):
            # `clip` spares numpy a buffer; rows of new ids are overwritten right away.
            np.take(rows, slots, axis=0, out=out, mode="clip")
        if len(new):
            out[new] = initial_rows(self.spec, self._seed, ids[new])

    @np.errstate(over="ignore", invalid="ignore")  # torch says nothing of nan and inf either
    def apply(self, parts: Sequence[RowGradients], rate: float) -> None:
        """
        Make one update of the rows that have gradients.

        Args:
            parts: one for each rank that used the table, in rank order; they are added in that
                order. Without rows the update counts nevertheless: they are on other servers, or
                nowhere, as where torch's sparse gradient is empty.
            rate: learning rate.
        """
        self.forget()
        slots, gradient = self._add_up(parts)
        kept = [rows.array[: len(slots)] for rows in self._room_to_keep(len(slots))]
        arrays = [rows.array for rows in self._arrays]
        for first in range(0, len(slots), self._block):
            part = slice(first, first + self._block)
            old = [array.take(slots[part], axis=0) for array in arrays]
            for keep, block in zip(kept, old, strict=False):
                keep[part] = block
            self._rule.update(old[0], old[1:], gradient[part], rate, self.updates)
            for rows, block in zip(self._arrays, old, strict=True):
                rows.put(slots[part], block)
        self.updates += 1
        if self._rewinds:
            self._before = slots

    def summed(self, parts: Sequence[RowGradients]) -> RowGradients:
        """Add gradients up as `apply` does: one that has the same effect as all of them."""
        used = [part for part in parts if len(part.ids)]
        if len(used) <= 1:
            return (used or parts)[0]
        slots, values = self._add_up(used)
        return RowGradients(parts[0].table, self._index.ids[slots], values)

    def forget(self) -> None:
        """Let go of what the last update has changed: nobody will take it back."""
        self._before = None

    def rewind(self) -> None:
        """Take the last update back, to the bit; rows that it brought are at their first values."""
        if self._before is not None:
            for rows, kept in zip(self._arrays, self._kept, strict=True):
                rows.put(self._before, kept.array[: len(self._before)])
            self.updates -= 1
            self._before = None

    def ids(self) -> Ids:
        """Give the ids of all rows in rising order, shape [len]."""
        if len(self._sorted) != len(self):
            self._sorted = np.sort(self._index.ids)
        return self._sorted

    def _room_to_keep(self, count: int) -> list[Rows]:
        """Give rows for what an update changes, none where it is not kept; used again and again."""
        if self._rewinds:
            self._kept = self._kept or [Rows(rows.width) for rows in self._arrays]
            for rows in self._kept:
                rows.grow(max(count, len(rows.array)))
        return self._kept

    def _slots(self, ids: Ids) -> NDArray[np.int64]:
        """Find rows, and make those that are missing."""
        slots = self._index.find(ids)
        new = np.flatnonzero(slots < 0)
        if len(new):
            slots[new] = self._index.add(ids[new])
            for rows in self._arrays:
                rows.grow(len(self._index))
            self._arrays[0].array[slots[new]] = initial_rows(self.spec, self._seed, ids[new])
        return slots

    def _add_up(self, parts: Sequence[RowGradients]) -> tuple[NDArray[np.int64], Values]:
        """Give slots, each once, and the sums of their gradients (I2)."""
        parts = [part for part in parts if len(part.ids)] or parts[:1]
        slots_by_part = [self._slots(part.ids) for part in parts]
        if len(parts) == 1:
            return slots_by_part[0], parts[0].values
        if len(self._summed) < len(self):
            self._summed = np.zeros(len(self) * 5 // 4, np.int64)
        slots = np.empty(sum(map(len, slots_by_part)), np.int64)
        sums, count = np.empty((len(slots), self.spec.width), np.float32), 0
        for part_slots, part in zip(slots_by_part, parts, strict=True):
            positions = self._summed[part_slots] - 1
            new = positions < 0
            more = slice(count, count + int(new.sum()))
            slots[more], sums[more] = part_slots[new], part.values[new]
            self._summed[part_slots[new]] = np.arange(more.start, more.stop) + 1
            sums[positions[~new]] += part.values[~new]
            count = more.stop
        self._summed[slots[:count]] = 0
        return slots[:count], sums[:count]
