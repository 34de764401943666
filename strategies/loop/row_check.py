"""Warning about losses that are means over rows, such as boxes, with several rows per sample."""

from __future__ import annotations

from typing import Any

from distplat.strategies.loop.containers import tensors_in


def rows_of(tree: Any, samples: int) -> int | None:
    """
    Return the number of rows of a batch whose first dimension is not its samples.

    Args:
        tree: outputs and targets.
        samples: number of samples in the batch.

    Returns:
        None: a dimension is the samples (also in time-first layout), all samples may have the same
        number of rows, or the number is ambiguous.
    """
    shapes = [tensor.shape for tensor in tensors_in(tree) if tensor.ndim]
    lengths = {shape[0] for shape in shapes}
    if len(lengths) != 1 or samples < 2 or any(samples in shape for shape in shapes):
        return None
    (rows,) = lengths
    return rows if rows > 1 and rows % samples and samples % rows else None


def rows_warning(rows: int, samples: int) -> str:
    """Return the warning that a loss is a mean over rows."""
    return (
        f"loss() is a mean over {rows} rows of {samples} samples, which is not a multiple of "
        f"{samples}: a scalar is taken as a mean over samples, so the result depends on the number "
        "of workers and micro-batches. Return (sum, number of rows) instead"
    )
