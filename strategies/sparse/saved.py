"""
Embedding tables in a checkpoint: saved by servers, and loaded by the same or other servers.

    embeddings-<server>.safetensors
        <table>/ids       [n] int64, in the order in which the rows were created
        <table>/rows      [n, width] float32
        <table>/<state>   [n, width or 1] float32, for each state of the rows' optimizer
        <table>/step      int64: updates of the table, the same on all servers

Each server writes a file. A server that loads the checkpoint reads its own rows from all files, so
a run can continue with another number of servers.
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
from distplat.strategies.sparse.table import Table, build_rule

_ROWS_AT_ONCE = 1 << 18
"""Number of rows copied at a time when a table is filled."""


def copies_of(tables: Sequence[Table], server: int) -> Bundle:
    """Copy all tables of a server."""
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
    Load a server's rows from a checkpoint into a table.

    Args:
        table: empty, or with initial rows.
        plan: assigns rows to servers.
        server: number of the server.
        files: of all servers that wrote the checkpoint.

    Raises:
        ProtocolError: the files do not contain this table.
    """
    for file in files:
        try:
            _fill(table, plan, server, file)
        except (KeyError, ValueError) as error:
            text = f"no table {table.spec.name!r} of width {table.spec.width} in the checkpoint"
            raise ProtocolError(f"{text}: {error}") from None


def _fill(table: Table, plan: TablePlan, server: int, file: Mapping[str, RawTensor]) -> None:
    prefix = f"{table.spec.name}/"
    columns = {k.removeprefix(prefix): _array(v) for k, v in file.items() if k.startswith(prefix)}
    table.updates = max(table.updates, int(columns.pop("step")))
    ids = columns.pop("ids")
    own = np.flatnonzero(server_of(plan, table.spec, ids) == server)
    for first in range(0, len(own), _ROWS_AT_ONCE):
        block = own[first : first + _ROWS_AT_ONCE]
        table.restore(ids[block], {name: values[block] for name, values in columns.items()})


def _array(raw: RawTensor) -> NDArray[Any]:
    return np.frombuffer(raw.data, np.dtype(raw.dtype)).reshape(raw.shape)


class _SavedRows:
    """Read-only rows in this process, see `RowSource`."""

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
    Connect the embeddings of a model to read-only rows, outside of a run.

    Args:
        model: built as in the task.
        run: a run directory; all rows of its tables are loaded into this process. None: all rows
            have their initial values, for trying out a model.
        seed: of the initial values, without `run`.

    Raises:
        StorageError: the directory has no such tables, or tables of another model.
    """
    seed, saved_tables = (seed, {}) if run is None else read_list(Path(run))
    for name, module in tables_of(model).items():
        spec = module.spec(name)
        table = Table(spec, seed, build_rule(RowSGD(name="SGD", lr=1.0)))
        if run is not None:
            if name not in saved_tables:
                raise StorageError(f"{run} has no table {name!r}: {hint(name, saved_tables)}")
            saved_spec, files = saved_tables[name]
            if saved_spec != spec:
                raise StorageError(f"table {name!r} of {run} is another: {saved_spec}, not {spec}")
            for file in files:
                read_part(file, table)
        module.source = _SavedRows(table)
