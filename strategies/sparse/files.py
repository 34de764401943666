"""
Trained tables on disk: parts that are written as they come, and a list of them.

    embeddings.json                          the tables, and the files of each
    embeddings.<number>-<table>.<server>.0000.safetensors
                                             `ids` [n] in rising order, `rows` [n, width]

No process holds a table to save it. What a table has not, it need not have: rows that were never
trained follow from the seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from distplat.platform.disk import open_regular
from distplat.platform.errors import StorageError
from distplat.platform.shard_map import TableSpec
from distplat.platform.total_memory import check_whole_file
from distplat.strategies.sparse.table import Table

LIST_NAME = "embeddings.json"
PART_BYTES = 64 * 2**20
_LIST_BYTES = 64 * 2**20
"""The largest list that is read: a million parts."""


class PartSource(Protocol):
    """A server, asked for what it keeps; while nobody pushes."""

    def sizes(self) -> list[tuple[TableSpec, int]]:
        """Give every table and the number of its rows here."""

    def part(self, table: int, first: int, count: int) -> bytes:
        """Give so many rows, counted in the order of ids, as a safetensors file."""


def packed_part(table: Table, first: int, count: int) -> bytes:
    """Give the rows at `first`, `first + 1`, ... in the order of ids, as a safetensors file."""
    ids = table.ids()[first : first + count]
    rows = np.empty((len(ids), table.spec.width), np.float32)
    table.read(ids, rows)
    return save({"ids": ids, "rows": rows})


def keep_tables(
    sources: Sequence[PartSource], seed: int, keep: Callable[[str, bytes], object]
) -> None:
    """
    Write all tables, part by part.

    Args:
        sources: the servers, in order.
        seed: of the job.
        keep: writes a file of that name.
    """
    tables: dict[str, dict[str, object]] = {}
    files: dict[str, list[str]] = {}
    for server, source in enumerate(sources):
        for number, (spec, rows) in enumerate(source.sizes()):
            tables[spec.name] = asdict(spec)
            names = files.setdefault(spec.name, [])
            count = max(1, PART_BYTES // (4 * spec.width))
            for part, first in enumerate(range(0, rows, count)):
                names.append(f"{_stem(number, spec.name)}.{server}.{part:04d}.safetensors")
                keep(names[-1], source.part(number, first, count))
    for name, facts in tables.items():
        facts["files"] = files[name]
    text = json.dumps({"seed": seed, "tables": list(tables.values())}, indent=2)
    keep(LIST_NAME, text.encode())  # last: who finds it finds all


def _stem(number: int, table: str) -> str:
    """Call a table's files: a name may hold anything but a dot, and be longer than a file's."""
    return f"embeddings.{number}-{re.sub(r'[^A-Za-z0-9_.-]', '_', table)[:80]}"


def read_list(run: Path) -> tuple[int, dict[str, tuple[TableSpec, list[Path]]]]:
    """
    Give the seed, and by name each table and its files.

    Raises:
        StorageError: there is no list, or it is not one of ours.
    """
    try:
        facts = json.loads(_list_text(run / LIST_NAME))
        tables = {}
        for entry in facts["tables"]:
            names = entry.pop("files")
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{outside[0]!r} is no file of it")
            files = [run / name for name in names]
            tables[str(entry["name"])] = TableSpec(**entry), files
        return int(facts["seed"]), tables
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"no embedding tables in {run}: {error}") from error


def _list_text(path: Path) -> bytes:
    with open_regular(path) as file:
        text = b"" if file is None else file.read(_LIST_BYTES + 1)
    if file is None or len(text) > _LIST_BYTES:
        raise ValueError(f"{path} is not there, or has more than {_LIST_BYTES} bytes")
    return text


def read_part(path: Path, table: Table) -> None:
    """
    Put the rows of one file into a table.

    Raises:
        StorageError: it cannot be read.
    """
    check_whole_file(path)
    try:
        part = load_file(path)
        ids, rows = part["ids"], part["rows"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StorageError(f"{path} is no part of an embedding table: {error}") from error
    if mismatch := _unlike(table.spec, ids, rows):
        raise StorageError(f"{path} is no part of table {table.spec.name!r}: it has {mismatch}")
    table.put(ids, rows)


def _unlike(spec: TableSpec, ids: NDArray[Any], rows: NDArray[Any]) -> str:
    """Say what a part has that the table cannot have; empty: nothing."""
    kinds = ids.dtype == np.int64 and rows.dtype == np.float32
    if not kinds or ids.ndim != 1 or rows.shape != (len(ids), spec.width):
        return f"{ids.dtype} of shape {ids.shape}, {rows.dtype} of shape {rows.shape}"
    if len(ids) and not 0 <= ids.min() <= ids.max() < (spec.rows or np.inf):
        return f"ids from {ids.min()} to {ids.max()}"
    return ""
