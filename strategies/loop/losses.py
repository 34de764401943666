"""
What a loss may be: what a task and its model make of a batch, in training and in evaluation.

A loss may be several terms, each a mean over something else. Their weights are known before any
forward:

    each rank    micro-batches of the step ── weights() ──▶ {term: weight}, summed
    all ranks    the sums of all, in rank order
    then         forward, {term: sum} ──▶ the sums over these weights, added up

The scale of losses in float16, whose small gradients would be zero, is as torch's `GradScaler`:

    every rank    loss x scale, backward: gradients are that much larger
    all ranks     the control record's weight is that much larger, too: what divides the sum of the
                  gradients gives what it would have been
    then          NaN or infinity on any rank: the step is left out, and the scale halved;
                  none in 2000 steps: the scale is doubled

All ranks look at the same sum of records, so they have the same scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.loop.checks import (
    checked_loss,
    checked_metrics,
    checked_step,
    checked_weight,
    method_location,
)
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.task import Task, has_step, method_of, targets_of


class Terms(NamedTuple):
    """What a loss of several terms is divided by."""

    totals: Mapping[str, float]
    """By term."""
    samples: int
    """Of all micro-batches that these are the weights of."""


class TermWeights:
    """
    One rank's part in the weights of a step, in one attempt.

    Args:
        task: has `weights`.
        make_group: makes the group of all ranks, or gives it; every rank calls it, or none.
        world: ranks that make a step together; 1: each by itself.
    """

    def __init__(
        self, task: Task, make_group: Callable[[], Collective | None] = lambda: None, world: int = 1
    ) -> None:
        self._task, self._make_group, self._world = task, make_group, world
        self._group: Collective | None = None

    def of_step(
        self, batches: Sequence[Any], samples: int, of_all: int, device: torch.device
    ) -> Terms:
        """
        Add up the weights of a step; every rank calls this, also one without samples.

        Args:
            batches: this rank's.
            samples: of them.
            of_all: samples of the step.
            device: of the model.

        Raises:
            ValueError: the task gave something else than weights.
            CollectiveError: a rank is missing.
        """
        own_weights = _added(weights_of(self._task, batch) for batch in batches)
        if self._world == 1:
            return Terms(own_weights, samples)
        if self._group is None:
            group = self._make_group()
            assert group is not None, "strategies whose ranks keep step have a group, or make one"
            self._group = group.subgroup("term-weights", range(group.world))
        return Terms(_added(gather_values(own_weights, self._group, device)), of_all)


def weights_of(task: Task, batch: Any) -> dict[str, float]:
    """
    Ask a task for the weights of a batch.

    Raises:
        ValueError: it gave something else; says what.
    """
    weights = method_of(task, "weights")(batch)
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        what = "None: is there a `return`?" if weights is None else f"a {type(weights).__name__}"
        text = "weights() must return a mapping of terms to numbers; got"
        raise ValueError(f"{method_location(task, 'weights')}{text} {what}")
    return {name: checked_weight(task, weight, "weights") for name, weight in weights.items()}


def _added(parts: Any) -> dict[str, float]:
    """Add mappings up, in their order."""
    total: dict[str, float] = {}
    for part in parts:
        for name, weight in part.items():
            total[name] = total.get(name, 0.0) + weight
    return total


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


class BatchResult(NamedTuple):
    """What a task and its model make of a batch."""

    outputs: Any
    """What `metrics` gets: what `forward` gave, or what `step` gave."""
    targets: Any
    term: LossTerm


def run_batch(
    task: Task, model: nn.Module, batch: Any, samples: int, terms: Terms | None
) -> BatchResult:
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
    outputs = task.step(model, batch) if has_step(task) else task.forward(model, batch)
    targets = targets_of(task, batch)
    return BatchResult(outputs, targets, loss_term(task, outputs, targets, samples, terms))


def loss_term(
    task: Task, outputs: Any, targets: Any, samples: int, terms: Terms | None = None
) -> LossTerm:
    """
    Give the task's loss of one micro-batch, by its `loss`, or as its `step` has given it.

    Args:
        task: the user's.
        outputs: what the model gave, or `step`.
        targets: as loaded.
        samples: of the micro-batch.
        terms: see `run_batch`.

    Raises:
        ValueError: it is neither a scalar nor (sum, weight).
    """
    if has_step(task):
        method, value = "step", checked_step(task, outputs)
    else:
        method, value = "loss", task.loss(outputs, targets)
    if terms is not None:
        together = _together(task, method, value, outputs, terms.totals)
        return LossTerm(together, float(terms.samples), float(samples))
    if isinstance(value, tuple) and len(value) == 2:
        if isinstance(value[1], Tensor) and value[1].requires_grad:
            where = f"{method_location(task, method)}{method}()"
            text = f"{where} gives a weight that depends on parameters"
            hint = "no gradient goes through a weight: .detach() it, or give the mean itself"
            raise ValueError(f"{text}, and {hint}")
        weight = checked_weight(task, value[1], method)
        return LossTerm(checked_loss(task, value[0], outputs, method), 1.0, weight, weighted=True)
    loss = checked_loss(task, value, outputs, method)
    return LossTerm(loss, float(samples), float(samples))


def _together(
    task: Task, method: str, value: Any, outputs: Any, totals: Mapping[str, float]
) -> Tensor:
    """Divide each term of a loss by its weight, and add them up; one without weight is nothing."""
    where = f"{method_location(task, method)}{method}()"
    if not isinstance(value, Mapping) or value.keys() != totals.keys():
        wanted = ", ".join(map(repr, totals))
        got = [*value] if isinstance(value, Mapping) else f"a {type(value).__name__}"
        text = f"must give a sum for each term that weights() names ({wanted}) as its loss"
        raise ValueError(f"{where} {text}; got {got}")
    shares = {name: 1.0 / weight if weight else 0.0 for name, weight in totals.items()}
    for name, term in value.items():
        if not isinstance(term, Tensor) or term.ndim:
            raise ValueError(f"{where} must give a scalar tensor, the sum, as {name!r}")
    parts = [value[name] * share for name, share in shares.items()]
    return checked_loss(task, torch.stack(parts).sum(), outputs, method)


class EvalBatch(NamedTuple):
    """What an evaluation batch gives."""

    figures: Figures
    kept: Mapping[str, Any]
    """The task's metrics with state, by name."""


def evaluate_batch(task: Task, made: BatchResult, samples: int) -> EvalBatch:
    """
    Give loss and metrics of one evaluation batch.

    Raises:
        ValueError: one of them is no number; names it.
    """
    term = made.term
    figures = {"loss": (float(term.value) * term.factor, term.weight)}
    means, kept = checked_metrics(task, made.outputs, made.targets)
    for name, mean in means.items():
        figures[name] = mean * samples, float(samples)
    return EvalBatch(figures, kept)


LOSS_SCALE = "loss_scale"
"""Fact of a checkpoint: the scale, and the steps since it was changed."""

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""Both are torch's. A scale is a power of two: to divide by it loses nothing."""


class LossScale:
    """
    One rank's scale, through all attempts of a run.

    Args:
        flat: what is trained.

    Raises:
        SpecError: parameters are in float16 themselves, where an update is lost.
    """

    def __init__(self, flat: FlatModel) -> None:
        half = [slot.name for slot in flat.trained_slots if slot.dtype == torch.float16]
        if half:
            text = f"the parameter {half[0]!r} is in float16, which small updates do not change"
            hint = "have model() make it in float32: forwards run in float16 all the same"
            raise SpecError(Problem(("precision",), text, hint))
        self._now = (FIRST_SCALE, 0)  #: the scale, and steps since it was changed
        self._after = {0: self._now}  #: by version: of the last one, and the one before

    @classmethod
    def of(cls, job: Job, flat: FlatModel) -> LossScale | None:
        """Give a job's; None: it trains in another precision."""
        return cls(flat) if job.precision == "fp16" else None

    @property
    def value(self) -> float:
        """What a loss is multiplied by in this step."""
        return self._now[0]

    def load(self, version: int, saved: tuple[float, int]) -> None:
        """Begin from a checkpoint."""
        self._now = saved
        self._after = {version: saved}

    def saved(self, version: int) -> tuple[float, int]:
        """Give what a checkpoint of a version needs."""
        return self._after.get(version, self._now)

    def sync(self, version: int, group: Collective | None, device: torch.device) -> None:
        """
        Have what the others have; every rank calls this when an attempt begins.

        Args:
            version: with which it begins.
            group: all ranks; None: there is one.
            device: of the model.
        """
        known = [self._after]
        if group is not None and group.world > 1:
            every = gather_values(list(self._after.items()), group, device)
            known = [{step: (one[0], one[1]) for step, one in pairs} for pairs in every]
        there = {step: one for after in reversed(known) for step, one in after.items()}
        # Servers may have made a step of whose outcome no worker was told: that of the one before.
        near = max((step for step in there if step <= version), default=None)
        self.load(version, there[near] if near is not None else (FIRST_SCALE, 0))

    def passed(self, step: int, total: StepControl) -> bool:
        """
        Learn how a step came out; say whether the scale was too large for it.

        Args:
            step: from 0.
            total: the records of all ranks, summed.
        """
        scale, steps = self._now
        overflow = total.non_finite > 0 and scale > 1.0
        if overflow:
            self._now = scale / 2, 0
        elif total.finite:
            grown = steps + 1 >= GROWTH_INTERVAL
            self._now = (scale * 2, 0) if grown else (scale, steps + 1)
        self._after = {n: one for n, one in self._after.items() if n == step}
        self._after[step + 1] = self._now
        return overflow
