"""Rows for a model outside of a run: those that a run has trained, or first values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distplat.platform.embeddings import RowSGD
from distplat.platform.errors import StorageError, hint
from distplat.platform.table_plan import TableSpec
from distplat.strategies.sparse.files import read_list, read_part
from distplat.strategies.sparse.modules import Sharded, tables_of
from distplat.strategies.sparse.rules import make_rule
from distplat.strategies.sparse.table import Table


class _Rows:
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
        spec = TableSpec(
            name, module.num_embeddings, module.embedding_dim, module.init_std, module.whole
        )
        table = Table(spec, seed, make_rule(RowSGD(name="SGD", lr=1.0)))
        if run is not None:
            if name not in kept:
                raise StorageError(f"{run} has no table {name!r}: {hint(name, kept)}")
            theirs, files = kept[name]
            if theirs != spec:
                raise StorageError(f"table {name!r} of {run} is another: {theirs}, not {spec}")
            for file in files:
                read_part(file, table)
        module.source = _Rows(table)
