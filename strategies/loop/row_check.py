"""Losses that are means over rows of which samples have more or less, such as boxes or windows."""

from __future__ import annotations

from typing import Any

from distplat.strategies.loop.containers import tensors_in


def rows_of(tree: Any, samples: int) -> int | None:
    """
    Count the rows of a batch that is not by sample.

    Args:
        tree: outputs and targets.
        samples: of the batch.

    Returns:
        None: the batch is by sample, each sample may have as many rows, or nobody can tell. A
        batch that has time first has its samples in another dimension, and is by sample.
    """
    shapes = [one.shape for one in tensors_in(tree) if one.ndim]
    lengths = {one[0] for one in shapes}
    if len(lengths) != 1 or samples < 2 or any(samples in one for one in shapes):
        return None
    (rows,) = lengths
    return rows if rows > 1 and rows % samples and samples % rows else None


def rows_warning(rows: int, samples: int) -> str:
    """Say that a loss is a mean over rows."""
    return (
        f"loss() is a mean over {rows} rows of {samples} samples, which are not a multiple of "
        "them: a scalar is taken for a mean over samples, so the result depends on the number of "
        "workers and micro-batches. Return (sum, number of rows) instead"
    )
