"""
What a loss may be: a mean over the samples, or a sum and the weight that it is divided by.

    mean        loss()  ->  scalar            the micro-batch's samples are its weight
    weighted    loss()  ->  (sum, weight)     for example the tokens that are not padding

Gradients are linear. So backward runs on the local sum times a constant that is equal on all ranks,
and the division by the weights of all ranks and micro-batches is one factor at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distplat.strategies.task import Task
from distplat.strategies.training.checks import checked_loss, checked_metrics, checked_weight

Figures = Mapping[str, tuple[float, float]]
"""By name: a sum, and the weight that it is divided by once all batches are added up."""


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


def loss_term(task: Task, outputs: Any, targets: Any, samples: int) -> LossTerm:
    """
    Give the task's loss of one micro-batch.

    Args:
        task: the user's.
        outputs: what the model gave.
        targets: as loaded.
        samples: of the micro-batch.

    Raises:
        ValueError: loss() gave neither a scalar nor (sum, weight).
    """
    value = task.loss(outputs, targets)
    if isinstance(value, tuple) and len(value) == 2:
        weight = checked_weight(task, value[1])
        return LossTerm(checked_loss(task, value[0], outputs), 1.0, weight, weighted=True)
    return LossTerm(checked_loss(task, value, outputs), float(samples), float(samples))


def eval_figures(task: Task, outputs: Any, targets: Any, samples: int) -> Figures:
    """
    Give loss and metrics of one evaluation batch.

    Raises:
        ValueError: one of them is no number; names it.
    """
    term = loss_term(task, outputs, targets, samples)
    figures = {"loss": (float(term.value) * term.factor, term.weight)}
    for name, mean in checked_metrics(task, outputs, targets).items():
        figures[name] = mean * samples, float(samples)
    return figures
