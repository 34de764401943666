"""
Files of trained embedding tables: parts, and a list of tables and parts.

    embeddings.json                          the tables, and the files of each
    embeddings.<number>-<table>.<server>.0000.safetensors
                                             `ids` [n] in ascending order, `rows` [n, width]

No process holds a whole table to save it. Rows that were never trained are not saved: they follow
from the seed.
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
"""Maximum size of a list that is read: about a million parts."""


class PartSource(Protocol):
    """A server from which table parts are read; no pushes may run meanwhile."""

    def sizes(self) -> list[tuple[TableSpec, int]]:
        """Return each table, and the number of its rows on this server."""

    def part(self, table: int, first: int, count: int) -> bytes:
        """Return `count` rows from `first` on, in the order of ids, as a safetensors file."""


def packed_part(table: Table, first: int, count: int) -> bytes:
    """Return the rows at `first`, `first + 1`, ... in the order of ids, as a safetensors file."""
    ids = table.ids()[first : first + count]
    rows = np.empty((len(ids), table.spec.width), np.float32)
    table.read(ids, rows)
    return save({"ids": ids, "rows": rows})


def keep_tables(
    sources: Sequence[PartSource], seed: int, keep: Callable[[str, bytes], object]
) -> None:
    """
    Save all tables, part by part.

    Args:
        sources: the servers, in order.
        seed: of the job.
        keep: writes a file of a name.
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
    keep(LIST_NAME, text.encode())  # last, so that a list implies complete parts


def _stem(number: int, table: str) -> str:
    """Return the file name prefix of a table, whose name may be no valid file name."""
    return f"embeddings.{number}-{re.sub(r'[^A-Za-z0-9_.-]', '_', table)[:80]}"


def read_list(run: Path) -> tuple[int, dict[str, tuple[TableSpec, list[Path]]]]:
    """
    Return the seed, and each table with its files, by name.

    Raises:
        StorageError: the list is missing or invalid.
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
    Load the rows of a file into a table.

    Raises:
        StorageError: the file cannot be read, or does not fit the table.
    """
    check_whole_file(path)
    try:
        part = load_file(path)
        ids, rows = part["ids"], part["rows"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StorageError(f"{path} is no part of an embedding table: {error}") from error
    if mismatch := _mismatch(table.spec, ids, rows):
        raise StorageError(f"{path} is no part of table {table.spec.name!r}: it has {mismatch}")
    table.put(ids, rows)


def _mismatch(spec: TableSpec, ids: NDArray[Any], rows: NDArray[Any]) -> str:
    """Return what in a part does not fit the table; empty: it fits."""
    right_dtypes = ids.dtype == np.int64 and rows.dtype == np.float32
    if not right_dtypes or ids.ndim != 1 or rows.shape != (len(ids), spec.width):
        return f"{ids.dtype} of shape {ids.shape}, {rows.dtype} of shape {rows.shape}"
    if len(ids) and not 0 <= ids.min() <= ids.max() < (spec.rows or np.inf):
        return f"ids from {ids.min()} to {ids.max()}"
    return ""
