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

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplat.platform.errors import ProtocolError
from distplat.platform.table_plan import TablePlan, TableSpec, file_of
from distplat.platform.tensor_slices import Bundle, Bytes, RawTensor, TensorEntry, TensorSlice
from distplat.strategies.sparse.routing import server_of
from distplat.strategies.sparse.table import Table

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
    mine = np.flatnonzero(_server_of(plan, table.spec, ids) == server)
    for first in range(0, len(mine), _AT_ONCE):
        some = mine[first : first + _AT_ONCE]
        table.restore(ids[some], {name: values[some] for name, values in columns.items()})


def _server_of(plan: TablePlan, spec: TableSpec, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return server_of(plan, spec, ids) if plan.servers > 1 else np.zeros_like(ids)


def _array(whole: RawTensor) -> NDArray[Any]:
    dtype = np.dtype(whole.dtype)
    return np.frombuffer(whole.data, dtype).reshape(whole.shape)
