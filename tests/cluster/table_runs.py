"""Jobs with embeddings on servers, and the tables of their runs."""

import json
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from small_runs import job

from distplat import Result


def words_job(strategy: Any, workers: int, servers: int = 2, **more: Any) -> dict[str, Any]:
    embeddings = {"servers": servers, "optimizer": {"name": "Adagrad", "lr": 0.2}}
    return job(strategy, workers, **{"task": "words:Words", "embeddings": embeddings, **more})


def read_tables(result: Result) -> dict[str, np.ndarray[Any, Any]]:
    """Return ids and rows of all tables, in the order of ids."""
    found = {}
    for table in json.loads((result.path / "embeddings.json").read_text())["tables"]:
        parts = [load_file(result.path / name) for name in table["files"]]
        ids = np.concatenate([part["ids"] for part in parts])
        rows = np.concatenate([part["rows"] for part in parts])
        found[table["name"]] = np.column_stack([ids, rows])[np.argsort(ids)]
    return found
