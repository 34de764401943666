"""
A worker's look-ups: rows that its model reads, and their gradients.

Every forward pulls the rows of its ids into a small tensor, and backward accumulates their
gradients there. After the step's last backward, the gradients of each row are summed in the order
of the forwards, and pushed.

A table is used in a step if a backward has reached its rows. A push has an entry for each used
table, even without rows if no id was looked up: torch counts such steps, too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.shard_map import TablePlan, TableSpec
from distplat.platform.spec import Job
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.checkpoint_types import ArrayRefs
from distplat.strategies.loop.control import NonFiniteSteps, StepControl
from distplat.strategies.ports import PendingPush, Tables
from distplat.strategies.sparse.modules import RowSource, Sharded, tables_of
from distplat.strategies.sparse.routing import Routed, route
from distplat.strategies.sparse.table import RowGradients


@dataclass
class _PendingGradient:
    """A forward's rows, whose gradients will be pushed."""

    ids: Routed
    rows: Tensor


class Lookups(RowSource):
    """
    The sharded embeddings of a worker's model.

    Args:
        model: searched for embeddings.
        job: must have the field `embeddings`.

    Raises:
        ValueError: the model has no table, or a table that the job's partition cannot split.
    """

    def __init__(self, model: nn.Module, job: Job) -> None:
        self._job, self._modules = job, tables_of(model)
        self._numbers = {module: n for n, module in enumerate(self._modules.values())}
        self.specs = tuple(module.spec(name) for name, module in self._modules.items())
        self._padding = [module.padding_idx for module in self._modules.values()]
        self._pending: list[list[_PendingGradient]] = [[] for _ in self.specs]
        self._summed: list[tuple[Routed, RowGradients]] | None = None
        self._pull_s, self._figures = 0.0, dict[str, float]()
        self._check()

    def connect(self, tables: Tables, total_steps: int, saved: SavedState | None = None) -> int:
        """
        Join an attempt; call `begin` before the model is used.

        Args:
            tables: the port.
            total_steps: of the run.
            saved: the checkpoint to resume from.

        Returns:
            Number of steps that the tables have applied, on every server.

        Raises:
            SpecError: the checkpoint has other tables.
        """
        if saved is not None:
            saved.check_tables(self.specs)
        self._tables = tables
        self.clear()
        self._plan, steps = tables.connect(self.specs, total_steps, saved)
        return steps

    def clear(self) -> None:
        """Discard the look-ups so far: their gradients are not pushed."""
        self._summed = None
        for pending in self._pending:
            pending.clear()

    def begin(self, version: int) -> None:
        """Start to serve rows of a version."""
        self._tables.begin(version)
        for module in self._modules.values():
            module.source = self

    @override
    def rows(self, module: Sharded, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `RowSource`. Rows of a trained table are recorded, to push their gradients later."""
        number = self._numbers[module]
        routed, order = route(self._plan, self.specs[number], ids.numpy())
        keep = torch.is_grad_enabled()  # also for a frozen table: backward may read its rows
        started = time.perf_counter()
        values = torch.from_numpy(self._tables.pull(number, routed, keep=keep))
        self._pull_s += keep * (time.perf_counter() - started)
        if module.padding_idx is not None:
            values[torch.from_numpy(routed.ids == module.padding_idx)] = 0.0
        if module.trained:
            values.requires_grad_()
            self._pending[number].append(_PendingGradient(routed, values))
        return values, None if order is None else torch.from_numpy(_inverse(order))

    def first_non_finite(self) -> str | None:
        """
        Check the gradients of the next `push` for NaN and infinity, after the last backward.

        Returns:
            Table and id of the first row with such a gradient, or None.
        """
        for _, rows in self._gradients():
            if rows.values.size and not isfinite(sum(_min_max(rows.values))):
                finite = np.isfinite(rows.values).all(axis=1)
                return f"{self.specs[rows.table].name}, id {rows.ids[finite.argmin()]}"
        return None

    def push(
        self, step: int, task: int | None = None, *, skip: bool = False, scale: float = 1.0
    ) -> PendingPush:
        """
        Start to push the gradients of the step's backwards.

        Args:
            step: see `Tables.push`.
            task: see `Tables.push`.
            skip: push nothing, and let all servers ignore other ranks' pushes of this step;
                asynchronous tables ignore only this rank's push.
            scale: factor of the gradients, for a weighted mean.
        """
        gradients = [] if skip else self._gradients()
        if scale != 1.0:
            gradients = [
                (ids, replace(rows, values=rows.values * scale)) for ids, rows in gradients
            ]
        self.clear()
        self._figures = {
            "rows": float(sum(len(ids.ids) for ids, _ in gradients)),
            "rows_pull_s": self._pull_s,
        }
        self._pull_s = 0.0
        return self._tables.push(step, gradients, task, skip)

    def copies(self, version: int) -> ArrayRefs | None:
        """Fetch the servers' copies of a version, for a checkpoint; from any thread."""
        copies = self._tables.copies(version)
        return None if copies is None else [(copy.ref, copy.entries) for copy in copies]

    def figures(self) -> dict[str, float]:
        """Return the last step's number of updated rows of this rank, and seconds of pulls."""
        return self._figures

    def _gradients(self) -> list[tuple[Routed, RowGradients]]:
        """Return the gradients of the step's backwards, an entry for each used table."""
        if self._summed is None:
            self._summed = []
            for number, (spec, pending) in enumerate(zip(self.specs, self._pending, strict=True)):
                parts = [self._without_padding(number, g.ids, g.rows.grad) for g in pending]
                reached = [part for part in parts if part is not None]
                if reached:
                    routed, sums = _sum_duplicates(self._plan, spec, reached)
                    self._summed.append((routed, RowGradients(number, routed.ids, sums)))
        return self._summed

    def _without_padding(
        self, number: int, ids: Routed, gradient: Tensor | None
    ) -> tuple[Routed, NDArray[np.float32]] | None:
        """Return a forward's ids and gradients without the padding; None: no backward ran."""
        if gradient is None:
            return None
        gradients = gradient.numpy()
        padding = self._padding[number]
        keep = ids.ids != padding
        if padding is None or keep.all():
            return ids, gradients
        before = np.concatenate([[0], np.cumsum(keep)])
        cuts = tuple(int(before[cut]) for cut in ids.cuts)
        return Routed(ids.ids[keep], cuts), gradients[keep]

    def _check(self) -> None:
        if not self._modules:
            raise ValueError(
                "the job has the field `embeddings`, and the model has no distplat.nn."
                "ShardedEmbedding: remove the field, or use one"
            )
        embeddings = self._job.embeddings
        assert embeddings is not None, "built only for jobs that have the field"
        open_ended = [name for name, m in self._modules.items() if m.num_embeddings is None]
        if embeddings.partition == "range" and open_ended:
            raise ValueError(
                f"embeddings.partition is `range`, but {', '.join(open_ended)} has no "
                "num_embeddings to cut: give it one, or take `hash`"
            )


@np.errstate(over="ignore", invalid="ignore")  # `first_non_finite` reports such values
def _sum_duplicates(
    plan: TablePlan, spec: TableSpec, parts: list[tuple[Routed, NDArray[np.float32]]]
) -> tuple[Routed, NDArray[np.float32]]:
    """Sum the gradients of each row, in the order of the forwards."""
    if len(parts) == 1:
        return parts[0]
    all_ids = torch.from_numpy(np.concatenate([ids.ids for ids, _ in parts]))
    unique, inverse = torch.unique(all_ids, return_inverse=True)
    routed, order = route(plan, spec, unique.numpy())
    if order is not None:
        inverse = torch.from_numpy(_inverse(order))[inverse]
    sums = np.zeros((len(unique), spec.width), np.float32)
    first = 0
    for ids, gradients in parts:  # ids are unique within a part
        sums[inverse[first : first + len(ids.ids)].numpy()] += gradients
        first += len(ids.ids)
    return routed, sums


def _min_max(values: NDArray[np.float32]) -> tuple[float, float]:
    """Return the minimum and maximum; both are NaN if an element is."""
    low, high = torch.from_numpy(values).aminmax()
    return float(low), float(high)


def _inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def lookups_of(model: nn.Module, job: Job) -> Lookups | None:
    """
    Return a model's look-ups; None: neither model nor job has tables.

    Raises:
        ValueError: only the model or only the job has tables, or see `Lookups`.
    """
    if job.embeddings is not None:
        return Lookups(model, job)
    if names := tables_of(model):
        raise ValueError(
            f"the model has rows on servers ({', '.join(names)}), and the job has none: add the "
            "field `embeddings`, for example {servers: 1, optimizer: {name: SGD, lr: 0.1}}"
        )
    return None


class RowPush:
    """
    A step's push of rows.

    Args:
        lookups: the model's embedding tables.
        steps: policy for non-finite steps.
        local: this rank's control record.
        number: of the push.
        task: of the push, if tasks are leased.
        rescales: whether the mean may have another divisor than the number of samples: loss()
            returned weights, or collate() may drop samples.
        slots: of the flat vector.
    """

    def __init__(
        self,
        lookups: Lookups,
        steps: NonFiniteSteps,
        local: StepControl,
        number: int,
        task: int | None,
        rescales: bool,
        slots: int,
    ) -> None:
        self._lookups, self._skips, self._rescales = lookups, steps.skips, rescales
        self._number, self._task = number, task
        self._row = lookups.first_non_finite() if steps.checks else None
        self.local = local if self._row is None else replace(local, non_finite=1, slot=slots)
        """The control record, with the result of the check of the rows."""
        self._sent: PendingPush | None = None
        self._pushed = False
        #: factor of rows that were pushed before that of the step was known; None: no such rows
        self._scale: float | None = None

    def before(self, *, waits: bool) -> None:
        """
        Push the rows before the dense gradients, if possible.

        Args:
            waits: the tables are asynchronous, and must have the rows before the dense gradients
                are pushed.
        """
        if waits:
            skip = self._skips and not self.local.finite
            self._push(skip=skip, scale=self.local.scale)
            self._wait()
        elif not self._skips and not self._rescales:
            self._push(skip=False, scale=1.0)
            self._scale = 1.0 if self.local.samples else None

    def after(self, total: StepControl) -> None:
        """
        Push the rows unless `before` did; wait until all servers have the step.

        Raises:
            ValueError: `before` has pushed the rows with another factor than the step's.
        """
        if not self._pushed:
            self._push(skip=total.skip, scale=total.scale)
        self._wait()
        if self._scale not in (None, total.scale):
            raise ValueError(
                "loss() returned (sum, weight) on some workers, and a mean on others, which have "
                "already pushed rows of embedding tables: return the same form for every batch"
            )

    def name(self, index: int) -> str:
        """Return the name for a `StepControl.slot` after the parameters, which stands for rows."""
        return self._row or "rows of an embedding table"

    def _wait(self) -> None:
        if self._sent is not None:
            self._sent.wait()
            self._sent = None

    def _push(self, *, skip: bool, scale: float) -> None:
        self._pushed = True
        self._sent = self._lookups.push(self._number, self._task, skip=skip, scale=scale)
