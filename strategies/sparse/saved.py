"""
Embedding tables in a checkpoint: what a server gives to it, and what another takes from it.

    embeddings-<server>.safetensors
        <table>/ids       [n] int64, in the order in which the rows came
        <table>/rows      [n, width] float32
        <table>/<state>   [n, width or 1] float32, for each state of the rows' optimizer
        <table>/step      int64: updates of the table, the same on all servers

The files are those of the servers that wrote them; whoever reads takes the rows that are its own,
so a run may go on with another number of servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distplat.platform.errors import ProtocolError, StorageError, hint
from distplat.platform.model_options import RowSGD
from distplat.platform.shard_map import TablePlan, file_of
from distplat.platform.tensor_slices import Bundle, Bytes, RawTensor, TensorEntry, TensorSlice
from distplat.strategies.sparse.files import read_list, read_part
from distplat.strategies.sparse.modules import Sharded, tables_of
from distplat.strategies.sparse.routing import server_of
from distplat.strategies.sparse.table import Table, make_rule

_AT_ONCE = 1 << 18
"""Rows that are copied at a time when a table is filled."""


def copies_of(tables: Sequence[Table], server: int) -> Bundle:
    """Copy all tables of one server."""
    arrays: list[Bytes] = []
    entries = []
    for table in tables:
        columns = {**table.copy(), "step": np.array(table.updates)}
        for name, array in columns.items():
            key = f"{file_of(server)}/{table.spec.name}/{name}"
            entries.append(
                TensorEntry(key, TensorSlice(array.shape), str(array.dtype), len(arrays))
            )
            arrays.append(array.reshape(-1).view(np.uint8))
    return arrays, tuple(entries)


def fill(
    table: Table, plan: TablePlan, server: int, files: Iterable[Mapping[str, RawTensor]]
) -> None:
    """
    Put those rows of a checkpoint into a table that belong to one server.

    Args:
        table: empty, or with rows at their first values.
        plan: says which rows are whose.
        server: number of it.
        files: of all servers that wrote the checkpoint.

    Raises:
        ProtocolError: the files are not those of such a table.
    """
    for file in files:
        try:
            _fill(table, plan, server, file)
        except (KeyError, ValueError) as error:
            what = f"no table {table.spec.name!r} of width {table.spec.width} in the checkpoint"
            raise ProtocolError(f"{what}: {error}") from None


def _fill(table: Table, plan: TablePlan, server: int, file: Mapping[str, RawTensor]) -> None:
    start = f"{table.spec.name}/"
    columns = {k.removeprefix(start): _array(v) for k, v in file.items() if k.startswith(start)}
    table.updates = max(table.updates, int(columns.pop("step")))
    ids = columns.pop("ids")
    own = np.flatnonzero(server_of(plan, table.spec, ids) == server)
    for first in range(0, len(own), _AT_ONCE):
        some = own[first : first + _AT_ONCE]
        table.restore(ids[some], {name: values[some] for name, values in columns.items()})


def _array(whole: RawTensor) -> NDArray[Any]:
    dtype = np.dtype(whole.dtype)
    return np.frombuffer(whole.data, dtype).reshape(whole.shape)


class _SavedRows:
    """A module's rows in this process (see `RowSource`): read, not trained."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def rows(self, module: Sharded, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = np.empty((len(ids), module.embedding_dim), np.float32)
        self._table.read(ids.numpy(), rows)
        if module.padding_idx is not None:
            rows[ids.numpy() == module.padding_idx] = 0.0
        return torch.from_numpy(rows), None


def connect(model: nn.Module, run: str | Path | None = None, *, seed: int = 0) -> None:
    """
    Give the embeddings of a model their rows, outside of a run; to be read, not trained.

    Args:
        model: built as the task builds it.
        run: a run directory; all rows of its tables are read into this process. None: all rows
            have their first values, for trying a model out.
        seed: of the first values, where there is no run.

    Raises:
        StorageError: the directory has no such tables, or not those of this model.
    """
    seed, kept = (seed, {}) if run is None else read_list(Path(run))
    for name, module in tables_of(model).items():
        spec = module.spec(name)
        table = Table(spec, seed, make_rule(RowSGD(name="SGD", lr=1.0)))
        if run is not None:
            if name not in kept:
                raise StorageError(f"{run} has no table {name!r}: {hint(name, kept)}")
            saved_spec, files = kept[name]
            if saved_spec != spec:
                raise StorageError(f"table {name!r} of {run} is another: {saved_spec}, not {spec}")
            for file in files:
                read_part(file, table)
        module.source = _SavedRows(table)
