"""Vectors of one or several types, as tensors to compute with: see platform/vector_layout.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.vector_layout import Layout, Piece, Segment
from distplat.strategies.algorithms.reduce import squared_norm


def dtype_name(tensor: Tensor) -> str:
    """Give the name of a tensor's type, for example `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def typed(vector: Tensor, start: int, stop: int, dtype: str) -> Tensor:
    """View a run of a vector in its own type, shape [its elements]."""
    run, kind = vector[start:stop], getattr(torch, dtype)
    return run if run.dtype == kind else run.view(kind)


def typed_views(vector: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """View some runs of a vector, each in its own type."""
    return [typed(vector, one.start, one.stop, one.dtype) for one in segments]


def segments_of(layout: Layout) -> NDArray[np.int64]:
    """Give the place of each piece's segment."""
    ends = np.array([segment.stop for segment in layout.segments], np.int64)
    starts = np.array([piece.start for piece in layout.pieces], np.int64)
    return np.searchsorted(ends, starts, side="right")


def scale_in_place(runs: Sequence[Tensor], scale: float) -> None:
    """Multiply some vectors by a number; by 1 costs nothing."""
    if scale != 1.0:
        for run in runs:
            run.mul_(scale)


def squared_norm_of(
    vector: Tensor, segments: Sequence[Segment], uncounted: Sequence[tuple[int, int]] = ()
) -> float:
    """
    Give the sum of squares of a vector, in float64.

    Args:
        vector: shape [n].
        segments: of which types it is.
        uncounted: runs to be left out, which rise.
    """
    total = 0.0
    for one in segments:
        at = one.start
        for start, stop in [*uncounted, (one.stop, one.stop)]:
            start, stop = min(max(start, at), one.stop), min(max(stop, at), one.stop)
            if at < start:
                total += squared_norm(typed(vector, at, start, one.dtype))
            at = max(at, stop)
    return total


def first_non_finite(
    vector: Tensor, segments: Sequence[Segment], pieces: Sequence[Piece]
) -> int | None:
    """
    Give the slot of the first parameter that has an element which is not finite; None: all are.

    One pass over the vector; slots are looked for only where it found something.
    """
    if all(is_finite(run) for run in typed_views(vector, segments)):
        return None
    for segment in segments:
        for piece in pieces:
            if segment.start <= piece.start < segment.stop:
                if not is_finite(typed(vector, piece.start, piece.stop, segment.dtype)):
                    return piece.slot
    return None


def is_finite(run: Tensor) -> bool:
    """Say whether all elements are finite."""
    if not run.numel():
        return True
    if math.isfinite(float(run.sum())):  # a quicker pass; only finite elements have a finite sum
        return True
    low, high = run.aminmax()  # of large elements the sum may overflow; both NaN where one is
    return math.isfinite(float(low)) and math.isfinite(float(high))
