"""What a loss may be: what a task and its model make of a batch, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distplat.strategies.loop.checks import (
    checked_loss,
    checked_metrics,
    checked_step,
    checked_weight,
    place,
)
from distplat.strategies.loop.term_weights import Terms
from distplat.strategies.task import Task, has_step, targets_of

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
    """Whether loss() or step() gave the weight."""


class Made(NamedTuple):
    """What a task and its model make of a batch."""

    outputs: Any
    """What `metrics` gets: what `forward` gave, or what `step` gave."""
    targets: Any
    term: LossTerm


def made_of(
    task: Task, model: nn.Module, batch: Any, samples: int, terms: Terms | None = None
) -> Made:
    """
    Run the whole model on a micro-batch.

    Args:
        task: the user's.
        model: whole.
        batch: as `collate` gave it, on the model's device.
        samples: of the micro-batch.
        terms: what the terms of the loss are divided by; None: it is one.

    Raises:
        ValueError: the task's `forward` does not take such a batch, or the loss is none.
    """
    if has_step(task):
        outputs = task.step(model, batch)
        value = checked_step(task, outputs)
        return Made(outputs, batch, _term(task, "step", value, outputs, samples, terms))
    outputs = task.forward(model, batch)
    targets = targets_of(task, batch)
    return Made(outputs, targets, loss_term(task, outputs, targets, samples, terms))


def loss_term(
    task: Task, outputs: Any, targets: Any, samples: int, terms: Terms | None = None
) -> LossTerm:
    """
    Give the task's loss of one micro-batch, by its `loss`.

    Args:
        task: the user's.
        outputs: what the model gave.
        targets: as loaded.
        samples: of the micro-batch.
        terms: see `made_of`.

    Raises:
        ValueError: loss() gave neither a scalar nor (sum, weight).
    """
    return _term(task, "loss", task.loss(outputs, targets), outputs, samples, terms)


def _term(
    task: Task, method: str, value: Any, outputs: Any, samples: int, terms: Terms | None
) -> LossTerm:
    """Read what a method of the task gave as loss."""
    if terms is not None:
        together = _together(task, method, value, outputs, terms.totals)
        return LossTerm(together, float(terms.samples), float(samples))
    if isinstance(value, tuple) and len(value) == 2:
        weight = checked_weight(task, value[1], method)
        return LossTerm(checked_loss(task, value[0], outputs, method), 1.0, weight, weighted=True)
    loss = checked_loss(task, value, outputs, method)
    return LossTerm(loss, float(samples), float(samples))


def _together(
    task: Task, method: str, value: Any, outputs: Any, totals: Mapping[str, float]
) -> Tensor:
    """Divide each term of a loss by its weight, and add them up; one without weight is nothing."""
    where = f"{place(task, method)}{method}()"
    if not isinstance(value, Mapping) or value.keys() != totals.keys():
        wanted = ", ".join(map(repr, totals))
        got = [*value] if isinstance(value, Mapping) else f"a {type(value).__name__}"
        text = f"must give a sum for each term that weights() names ({wanted}) as its loss"
        raise ValueError(f"{where} {text}; got {got}")
    shares = {name: 1.0 / weight if weight else 0.0 for name, weight in totals.items()}
    for name, one in value.items():
        if not isinstance(one, Tensor) or one.ndim:
            raise ValueError(f"{where} must give a scalar tensor, the sum, as {name!r}")
    parts = [value[name] * share for name, share in shares.items()]
    return checked_loss(task, torch.stack(parts).sum(), outputs, method)


def eval_figures(task: Task, made: Made, samples: int) -> Figures:
    """
    Give loss and metrics of one evaluation batch.

    Raises:
        ValueError: one of them is no number; names it.
    """
    term = made.term
    figures = {"loss": (float(term.value) * term.factor, term.weight)}
    for name, mean in checked_metrics(task, made.outputs, made.targets).items():
        figures[name] = mean * samples, float(samples)
    return figures
