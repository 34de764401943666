"""
One worker's look-ups: rows that its model asks for, and gradients that it owes for them.

Every forward pulls the rows of its ids into a small tensor; backward leaves their gradients there.
When the step's last backward is over, what belongs to one row is added up, in the order of the
forwards, and pushed.

A table is used in a step where a backward has come to rows of it. What is pushed has an entry for
each table that was used, without rows where no id was looked up: torch counts such steps, too.
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
    """One forward's rows, whose gradients are to be pushed."""

    ids: Routed
    rows: Tensor


class Lookups(RowSource):
    """
    The embeddings of one worker's model.

    Args:
        model: whose modules are looked for.
        job: must have the field `embeddings`.

    Raises:
        ValueError: the model has no table, or one that the job cannot place.
    """

    def __init__(self, model: nn.Module, job: Job) -> None:
        self._job, self._modules = job, tables_of(model)
        self._numbers = {module: n for n, module in enumerate(self._modules.values())}
        self.specs = tuple(module.spec(name) for name, module in self._modules.items())
        self._padding = [module.padding_idx for module in self._modules.values()]
        self._owed: list[list[_PendingGradient]] = [[] for _ in self.specs]
        self._made: list[tuple[Routed, RowGradients]] | None = None
        self._pull_s, self._figures = 0.0, dict[str, float]()
        self._check()

    def connect(self, tables: Tables, total_steps: int, saved: SavedState | None = None) -> int:
        """
        Join an attempt; `begin` must follow before the model is used.

        Args:
            tables: the port.
            total_steps: of the run.
            saved: the checkpoint to begin from.

        Returns:
            Steps that the tables have behind them, on every server.

        Raises:
            SpecError: it has other tables.
        """
        if saved is not None:
            saved.check_tables(self.specs)
        self._tables = tables
        self._clear()
        self._plan, steps = tables.connect(self.specs, total_steps, saved)
        return steps

    def begin(self, version: int) -> None:
        """Begin to serve rows, of the version after so many steps."""
        self._tables.begin(version)
        for module in self._modules.values():
            module.source = self

    @override
    def rows(self, module: Sharded, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of a table that is trained are owed a gradient."""
        number = self._numbers[module]
        routed, order = route(self._plan, self.specs[number], ids.numpy())
        keep = torch.is_grad_enabled()  # of a frozen table, too: backward may read its rows
        began = time.perf_counter()
        values = torch.from_numpy(self._tables.pull(number, routed, keep=keep))
        self._pull_s += keep * (time.perf_counter() - began)
        if module.padding_idx is not None:
            values[torch.from_numpy(routed.ids == module.padding_idx)] = 0.0
        if module.trained:
            values.requires_grad_()
            self._owed[number].append(_PendingGradient(routed, values))
        return values, None if order is None else torch.from_numpy(_inverse(order))

    def first_non_finite(self) -> str | None:
        """
        Look for nan and inf in what `push` is about to send; after the step's last backward.

        Returns:
            Table and id of the first row with one, None where there is none.
        """
        for _, given in self._gradients():
            if given.values.size and not isfinite(sum(_ends(given.values))):
                finite = np.isfinite(given.values).all(axis=1)
                return f"{self.specs[given.table].name}, id {given.ids[finite.argmin()]}"
        return None

    def push(
        self, step: int, task: int | None = None, *, skip: bool = False, scale: float = 1.0
    ) -> PendingPush:
        """
        Begin to push what the step's backwards have left.

        Args:
            step: as for `Tables.push`.
            task: as there.
            skip: push nothing, and have all servers leave out what other ranks push for this step;
                asynchronous tables leave out this rank's push alone.
            scale: what gradients are multiplied by: makes them those of a weighted mean.
        """
        gradients = [] if skip else self._gradients()
        if scale != 1.0:
            gradients = [
                (ids, replace(rows, values=rows.values * scale)) for ids, rows in gradients
            ]
        self._clear()
        self._figures = {
            "rows": float(sum(len(ids.ids) for ids, _ in gradients)),
            "rows_pull_s": self._pull_s,
        }
        self._pull_s = 0.0
        return self._tables.push(step, gradients, task, skip)

    def copies(self, version: int) -> ArrayRefs | None:
        """Fetch what the servers have kept of a version, for a checkpoint; from any thread."""
        copies = self._tables.copies(version)
        return None if copies is None else [(copy.ref, copy.entries) for copy in copies]

    def figures(self) -> dict[str, float]:
        """Give rows that the step just made has updated for this rank, and seconds of pulls."""
        return self._figures

    def _clear(self) -> None:
        self._made = None
        for owed in self._owed:
            owed.clear()

    def _gradients(self) -> list[tuple[Routed, RowGradients]]:
        """Give what the step's backwards have left, an entry for each table that was used."""
        if self._made is None:
            self._made = []
            for number, (spec, owed) in enumerate(zip(self.specs, self._owed, strict=True)):
                parts = [self._without_padding(number, one.ids, one.rows.grad) for one in owed]
                reached = [part for part in parts if part is not None]
                if reached:
                    routed, sums = _added_up(self._plan, spec, reached)
                    self._made.append((routed, RowGradients(number, routed.ids, sums)))
        return self._made

    def _without_padding(
        self, number: int, ids: Routed, gradient: Tensor | None
    ) -> tuple[Routed, NDArray[np.float32]] | None:
        """Give ids and gradients of one forward, but for the padding; None: no backward came."""
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
        assert embeddings is not None, "made only for jobs that have the field"
        open_ended = [name for name, m in self._modules.items() if m.num_embeddings is None]
        if embeddings.partition == "range" and open_ended:
            raise ValueError(
                f"embeddings.partition is `range`, but {', '.join(open_ended)} has no "
                "num_embeddings to cut: give it one, or take `hash`"
            )


@np.errstate(over="ignore", invalid="ignore")  # `first_non_finite` is there for that
def _added_up(
    plan: TablePlan, spec: TableSpec, parts: list[tuple[Routed, NDArray[np.float32]]]
) -> tuple[Routed, NDArray[np.float32]]:
    """Sum the gradients of rows that forwards have used, in the order of the forwards."""
    if len(parts) == 1:
        return parts[0]
    together = torch.from_numpy(np.concatenate([ids.ids for ids, _ in parts]))
    unique, inverse = torch.unique(together, return_inverse=True)
    routed, order = route(plan, spec, unique.numpy())
    if order is not None:
        inverse = torch.from_numpy(_inverse(order))[inverse]
    sums = np.zeros((len(unique), spec.width), np.float32)
    first = 0
    for ids, gradients in parts:  # within one part each id comes once
        sums[inverse[first : first + len(ids.ids)].numpy()] += gradients
        first += len(ids.ids)
    return routed, sums


def _ends(values: NDArray[np.float32]) -> tuple[float, float]:
    """Give least and largest element; both are nan where one is."""
    low, high = torch.from_numpy(values).aminmax()
    return float(low), float(high)


def _inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def lookups_of(model: nn.Module, job: Job) -> Lookups | None:
    """
    Give a model's look-ups; None where neither model nor job knows of tables.

    Raises:
        ValueError: only one of the two does, or see `Lookups`.
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
    One step's push of rows.

    Args:
        lookups: the model's embedding tables.
        steps: what becomes of steps that are not finite.
        local: this rank's control record.
        number: of the push.
        task: what it is of, where tasks are leased.
        weighted: whether loss() gave weights.
        slots: of the flat vector.
    """

    def __init__(
        self,
        lookups: Lookups,
        steps: NonFiniteSteps,
        local: StepControl,
        number: int,
        task: int | None,
        weighted: bool,
        slots: int,
    ) -> None:
        self._lookups, self._skips, self._weighted = lookups, steps.skips, weighted
        self._number, self._task = number, task
        self._row = lookups.first_non_finite() if steps.checks else None
        self.local = local if self._row is None else replace(local, non_finite=1, slot=slots)
        """The record, with what was found in the rows."""
        self._sent: PendingPush | None = None
        self._pushed = False

    def before(self, *, waits: bool) -> None:
        """
        Have the rows leave, if they may before the gradients do.

        Args:
            waits: the tables are asynchronous, and must have the rows before the gradients leave.
        """
        if waits:
            skip = self._skips and not self.local.finite
            self._push(skip=skip, scale=self.local.scale)
            self._wait()
        elif not self._skips and not self._weighted:
            self._push(skip=False, scale=1.0)

    def after(self, total: StepControl) -> None:
        """Push the rows now, unless that was done; return when all servers have the step."""
        if not self._pushed:
            self._push(skip=total.skip, scale=total.scale)
        self._wait()

    def name(self, index: int) -> str:
        """Name what `StepControl.slot` counts behind the parameters: rows are all there is."""
        return self._row or "rows of an embedding table"

    def _wait(self) -> None:
        if self._sent is not None:
            self._sent.wait()
            self._sent = None

    def _push(self, *, skip: bool, scale: float) -> None:
        self._pushed = True
        self._sent = self._lookups.push(self._number, self._task, skip=skip, scale=scale)
