"""
What a loss may be: a mean over the samples, or a sum and the weight that it is divided by.

    mean        loss()  ->  scalar            the micro-batch's samples are its weight
    weighted    loss()  ->  (sum, weight)     for example the tokens that are not padding

Gradients are linear. So backward runs on the local sum times a constant that is equal on all ranks,
and the division by the weights of all ranks and micro-batches is one factor at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LossTerm:
    """One micro-batch's term of the step's loss."""

    value: Tensor
    """Scalar: the mean over the samples, or the sum."""
    factor: float
    """What `value` counts by in the sum over the step: the samples, or 1 for a sum."""
    weight: float
    """What the sum is to be divided by."""
    weighted: bool = False
    """Whether loss() gave the weight."""


def loss_term(value: Any, samples: int) -> LossTerm:
    """
    Read what a task's loss() gave for one micro-batch.

    Args:
        value: a scalar, or a pair of a scalar and a weight.
        samples: of the micro-batch.

    Raises:
        ValueError: it is neither; or the weight is negative, infinite or NaN.
    """
    if isinstance(value, tuple) and len(value) == 2:
        weight = float(value[1])
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"loss() gave the weight {weight:g}: it must be finite, 0 or more")
        return LossTerm(_scalar(value[0]), 1.0, weight, weighted=True)
    return LossTerm(_scalar(value), float(samples), float(samples))


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss() must return a scalar, the mean over the batch, or (sum, weight); got {got}"
        )
    return value
