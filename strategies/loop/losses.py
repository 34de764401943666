"""
Losses of a batch, in training and evaluation: terms with weights, and the loss scale of float16.

A loss may have several terms with different denominators. The denominators are known before the
first forward of a step:

    each rank    sums weights(batch) -> {term: weight} over its micro-batches
    all ranks    sum these mappings in rank order
    then         the loss is the sum over all terms of loss(batch)[term] / weight

The loss scale of float16, in which small gradients would underflow, follows torch's `GradScaler`:

    each rank    multiplies the loss by the scale before backward, and so the gradients
    all ranks    multiply the control record's weight by the scale, too, so that the division of the
                 summed gradients removes the scale
    then         NaN or infinity on any rank: the step is skipped and the scale halved;
                 2000 steps without: the scale is doubled

All ranks see the same summed record, so that all have the same scale.
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
    """Denominators of a loss with several terms."""

    totals: Mapping[str, float]
    """Denominator of each term."""
    samples: int
    """Number of samples in the micro-batches over which the weights are summed."""


class TermWeights:
    """
    Sums the weights of a step's loss terms over all ranks, during one attempt.

    Args:
        task: task with the method `weights`.
        make_group: returns the group of all ranks; called by all ranks or by none.
        world: number of ranks that train a step together; 1: each rank trains on its own.
    """

    def __init__(
        self, task: Task, make_group: Callable[[], Collective | None] = lambda: None, world: int = 1
    ) -> None:
        self._task, self._make_group, self._world = task, make_group, world
        self._group: Collective | None = None

    def of_step(
        self, batches: Sequence[Any], samples: int, all_samples: int, device: torch.device
    ) -> Terms:
        """
        Sum the weights of a step; all ranks call this, also those without samples.

        Args:
            batches: micro-batches of this rank.
            samples: number of samples in these batches.
            all_samples: number of samples of the step.
            device: device of the model.

        Raises:
            ValueError: `weights` did not return a mapping of names to weights.
            CollectiveError: a rank is missing.
        """
        local = _sum_mappings(weights_of(self._task, batch) for batch in batches)
        if self._world == 1:
            return Terms(local, samples)
        if self._group is None:
            group = self._make_group()
            assert group is not None, "synchronous strategies have a group, or create one"
            self._group = group.subgroup("term-weights", range(group.world))
        return Terms(_sum_mappings(gather_values(local, self._group, device)), all_samples)


def weights_of(task: Task, batch: Any) -> dict[str, float]:
    """
    Return the weights of a batch.

    Raises:
        ValueError: `weights` did not return a mapping of names to weights.
    """
    weights = method_of(task, "weights")(batch)
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        what = "None: is there a `return`?" if weights is None else f"a {type(weights).__name__}"
        text = "weights() must return a mapping of terms to numbers; got"
        raise ValueError(f"{method_location(task, 'weights')}{text} {what}")
    return {name: checked_weight(task, weight, "weights") for name, weight in weights.items()}


def _sum_mappings(parts: Any) -> dict[str, float]:
    """Sum mappings by key, in the given order."""
    total: dict[str, float] = {}
    for part in parts:
        for name, weight in part.items():
            total[name] = total.get(name, 0.0) + weight
    return total


Figures = Mapping[str, tuple[float, float]]
"""By name: a sum and its weight, which divides the total over all batches."""


@dataclass(frozen=True)
class LossTerm:
    """One micro-batch's term of the step's loss."""

    value: Tensor
    """Scalar: a mean over samples, or a sum."""
    factor: float
    """Factor of `value` in the sum over the step: the number of samples for a mean, 1 for a sum."""
    weight: float
    """Contribution to the divisor of the step's sum."""
    weighted: bool = False
    """Whether loss() or step() returned the weight."""

    def total(self) -> float:
        """Return the summand of the step's loss; 0 without samples, whose mean is NaN."""
        return self.value.item() * self.factor if self.factor else 0.0


class BatchResult(NamedTuple):
    """Outputs, targets and loss of a batch."""

    outputs: Any
    """Return value of `forward` or `step`, which `metrics` receives."""
    targets: Any
    term: LossTerm


def run_batch(
    task: Task, model: nn.Module, batch: Any, samples: int, terms: Terms | None
) -> BatchResult:
    """
    Run the whole model on a micro-batch.

    Args:
        task: the user's task.
        model: the unsharded model.
        batch: output of `collate`, on the model's device.
        samples: number of samples in the micro-batch.
        terms: denominators of the loss terms; None: the loss is a single term.

    Raises:
        ValueError: `forward` does not accept such a batch, or the loss is invalid.
    """
    outputs = task.step(model, batch) if has_step(task) else task.forward(model, batch)
    targets = targets_of(task, batch)
    return BatchResult(outputs, targets, loss_term(task, outputs, targets, samples, terms))


def loss_term(
    task: Task, outputs: Any, targets: Any, samples: int, terms: Terms | None = None
) -> LossTerm:
    """
    Return the loss of one micro-batch: the value of `loss`, or the return value of `step`.

    Args:
        task: the user's task.
        outputs: outputs of the model, or return value of `step`.
        targets: targets of the batch.
        samples: number of samples in the micro-batch.
        terms: see `run_batch`.

    Raises:
        ValueError: the loss is neither a scalar nor (sum, weight).
    """
    if has_step(task):
        method, value = "step", checked_step(task, outputs)
    else:
        method, value = "loss", task.loss(outputs, targets)
    if terms is not None:
        total = _sum_terms(task, method, value, outputs, terms.totals)
        return LossTerm(total, float(terms.samples), float(samples))
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


def _sum_terms(
    task: Task, method: str, value: Any, outputs: Any, totals: Mapping[str, float]
) -> Tensor:
    """Divide each term of a loss by its weight and sum them; a term without weight counts 0."""
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
    """Metrics of an evaluation batch."""

    figures: Figures
    kept: Mapping[str, Any]
    """Metrics with state, by name."""


def evaluate_batch(task: Task, result: BatchResult, samples: int) -> EvalBatch:
    """
    Return loss and metrics of one evaluation batch.

    Raises:
        ValueError: a metric is not a number; names the metric.
    """
    term = result.term
    figures = {"loss": (term.total(), term.weight)}
    means, kept = checked_metrics(task, result.outputs, result.targets)
    for name, mean in means.items():
        figures[name] = mean * samples if samples else 0.0, float(samples)
    for name in kept.keys() & figures:  # "loss": a metric of that name replaces the loss
        del figures[name]
    return EvalBatch(figures, kept)


LOSS_SCALE = "loss_scale"
"""Key in a checkpoint's state: the scale, and the number of steps since its last change."""

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""Values of torch's `GradScaler`. Dividing by a power of two is exact."""


class LossScale:
    """
    One rank's loss scale, through all attempts of a run.

    Args:
        flat: the flat model.

    Raises:
        SpecError: a parameter is in float16 itself, where small updates underflow.
    """

    def __init__(self, flat: FlatModel) -> None:
        half = [slot.name for slot in flat.trained_slots if slot.dtype == torch.float16]
        if half:
            text = f"the parameter {half[0]!r} is in float16, which small updates do not change"
            hint = "have model() make it in float32: forwards run in float16 all the same"
            raise SpecError(Problem(("precision",), text, hint))
        self._now = (FIRST_SCALE, 0)  #: the scale, and steps since its last change
        self._after = {0: self._now}  #: by version, for the last two versions

    @classmethod
    def of(cls, job: Job, flat: FlatModel) -> LossScale | None:
        """Return the loss scale of a job; None: another precision than fp16."""
        return cls(flat) if job.precision == "fp16" else None

    @property
    def value(self) -> float:
        """Factor of the loss in this step."""
        return self._now[0]

    def load(self, version: int, saved: tuple[float, int]) -> None:
        """Load the state of a checkpoint."""
        self._now = saved
        self._after = {version: saved}

    def saved(self, version: int) -> tuple[float, int]:
        """Return the state for a checkpoint of a version."""
        return self._after.get(version, self._now)

    def sync(self, version: int, group: Collective | None, device: torch.device) -> None:
        """
        Adopt the newest scale of all ranks; all ranks call this at the start of an attempt.

        Args:
            version: version of the parameters at the start.
            group: group of all ranks; None: there is a single rank.
            device: device of the model.
        """
        by_rank = [self._after]
        if group is not None and group.world > 1:
            gathered = gather_values(list(self._after.items()), group, device)
            by_rank = [{step: (scale[0], scale[1]) for step, scale in pairs} for pairs in gathered]
        scales = {step: scale for after in reversed(by_rank) for step, scale in after.items()}
        # Servers may have applied a step whose outcome reached no worker: use the step before.
        newest = max((step for step in scales if step <= version), default=None)
        self.load(version, scales[newest] if newest is not None else (FIRST_SCALE, 0))

    def update(self, step: int, total: StepControl) -> bool:
        """
        Update the scale after a step; return whether the step's gradients overflowed.

        Args:
            step: step, from 0.
            total: sum of all ranks' control records.
        """
        scale, steps = self._now
        overflow = total.non_finite > 0 and scale > 1.0
        if overflow:
            self._now = scale / 2, 0
        elif total.finite:
            grows = steps + 1 >= GROWTH_INTERVAL
            self._now = (scale * 2, 0) if grows else (scale, steps + 1)
        self._after = {n: scale for n, scale in self._after.items() if n == step}
        self._after[step + 1] = self._now
        return overflow
