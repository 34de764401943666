"""
Where two trainings part, by how much against the noise of rounding, and what the likely reason is.

A tensor's noise floor is the largest difference so far between the reference and the same one
summed in reverse order, and at least a quarter of a rounding of the tensor's largest element, in
the coarsest type of the model, times the root of the number of steps.
Differences up to `FACTOR` floors are rounding; a true fault is orders of magnitude larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distplat.strategies.verification.recipes import Trained

FACTOR = 16.0
"""Noise floors that a difference may be: the farthest of a hundred drawn trainings was at 3."""
LOSS = "(loss)"
"""Stands for the loss, where names of parameters stand."""


@dataclass(frozen=True)
class Comparison:
    """What came of comparing a run with its reference."""

    difference: float
    """The largest in terms of its floor: of all tensors and the loss, over all steps."""
    floor: float
    """Of the same tensor in the same step."""
    diverges: bool
    """Whether it is more than rounding."""
    name: str = ""
    """The first tensor that parts, in the model's order, `(loss)` before all; else the farthest."""
    step: int = 0
    """In which step, from 1."""
    reason: str = ""
    """What most likely is behind it, where they part."""


@dataclass(frozen=True)
class _Gap:
    step: int
    name: str
    difference: float
    floor: float

    @property
    def diverges(self) -> bool:
        return not self.difference <= FACTOR * self.floor  # NaN parts

    @property
    def ratio(self) -> float:
        if math.isnan(self.difference):
            return math.inf
        if not self.floor:
            return math.inf if self.difference else 0.0
        return self.difference / self.floor


def compare(
    run: Trained, reference: Trained, reversed_: Trained, trainable: Sequence[str], least: float = 0
) -> Comparison:
    """
    Compare a run with its reference.

    Args:
        run: of the engine.
        reference: of the plain loop.
        reversed_: the same, summed in reverse order.
        trainable: names of the parameters that the reference trains.
        least: floors are at least such a part of a tensor's largest element, or of 1.
    """
    if not is_finite(reference):
        return Comparison(math.nan, 0.0, True, reason="the task itself gives NaN or infinity")
    names = {*last(reference)} ^ {*last(run)}
    if names:
        odd = sorted(names)
        return Comparison(math.inf, 0.0, True, odd[0], reason="the models have other tensors")
    run = replace(run, states={0: reference.states[0], **run.states})
    gaps = list(_gaps(run, reference, reversed_, least))
    parting = [gap for gap in gaps if gap.diverges]
    if not parting:
        worst = max(gaps, key=lambda gap: gap.ratio)
        return Comparison(worst.difference, worst.floor, False, worst.name, worst.step)
    first = min(parting, key=lambda gap: gap.step)
    together = [gap for gap in parting if gap.step == first.step]
    worst = max(parting, key=lambda gap: (gap.difference, gap.ratio))
    reason = _reason(run, reference, first, {gap.name for gap in together}, trainable)
    return Comparison(worst.difference, worst.floor, True, first.name, first.step, reason)


def last(trained: Trained) -> dict[str, Tensor]:
    """Give the model as it was trained."""
    return trained.states[max(trained.states)]


def is_finite(trained: Trained) -> bool:
    """Say whether losses and the trained model are finite."""
    state = [bool(torch.isfinite(value).all()) for value in last(trained).values()]
    return all(state) and all(map(math.isfinite, trained.losses))


def _gaps(run: Trained, reference: Trained, reversed_: Trained, least: float) -> Sequence[_Gap]:
    floors: dict[str, float] = {}
    gaps = []
    eps = max(map(_eps, reference.states[0].values()), default=0.0)
    for step in range(1, len(reference.losses) + 1):
        losses = [each.losses[step - 1] for each in (run, reference, reversed_)]
        drift = eps * math.sqrt(step) / 4
        floor = max(abs(losses[1] - losses[2]), drift * abs(losses[1]))
        floors[LOSS] = floor = max(floor, floors.get(LOSS, 0.0), _least(least, abs(losses[1])))
        gaps.append(_Gap(step, LOSS, abs(losses[0] - losses[1]), floor))
        other_state = run.states.get(step)
        for name, value in reference.states.get(step, {}).items():
            size = _largest(value)
            floor = max(_distance(value, reversed_.states[step][name]), drift * size)
            floor = max(floor, floors.get(name, 0.0), _least(least, size))
            floors[name] = floor
            if other_state is not None:
                gaps.append(_Gap(step, name, _distance(other_state[name], value), floor))
    return gaps


def _least(part: float, size: float) -> float:
    return part * max(1.0, size) / FACTOR


def _eps(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0


def _largest(value: Tensor) -> float:
    return float(_wide(value).abs().max()) if value.numel() else 0.0


def _distance(a: Tensor, b: Tensor) -> float:
    """Give the largest difference of two elements; infinite for other shapes."""
    if a.shape != b.shape:
        return math.inf
    return _largest(_wide(a) - _wide(b))


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _reason(
    run: Trained, reference: Trained, first: _Gap, names: set[str], trainable: Sequence[str]
) -> str:
    """Give the likely reason by what parts first; the table of docs/guarantees.md."""
    tensors = names - {LOSS}
    if not is_finite(run):
        return "the run comes to NaN or infinity where the plain loop does not"
    if LOSS in names and first.step == 1:
        return (
            "the first forward differs: ranks have other samples, buffers or frozen parameters, "
            "or random numbers that the seed does not reach"
        )
    if tensors and not tensors & set(trainable):
        return (
            "buffers or frozen parameters are not those of a plain loop: they are not synchronised"
        )
    unused = tensors & set(trainable) - reference.used[first.step - 1]
    if unused and unused == tensors & set(trainable):
        return (
            "parameters without a gradient were moved: weight decay or momentum where torch skips"
        )
    if _stuck(run, reference, tensors):
        return "parameters that a plain loop moves stay as they are"
    times = _times(run, reference, tensors, first.step)
    if times is not None:
        return f"updates are {times:.3g} times as large: the loss is no mean, or counts twice"
    if tensors < set(trainable) & reference.used[first.step - 1]:
        return "some gradients are not those of the whole batch: some of it is lost or counts twice"
    return "gradients or updates are not those of a plain loop, in all parameters"


def _stuck(run: Trained, reference: Trained, names: set[str]) -> bool:
    """Say whether the run never moves one of the tensors, and the reference does."""
    ends = run.states[0], last(run), reference.states[0], last(reference)
    return any(
        torch.equal(ends[0][name], ends[1][name]) and not torch.equal(ends[2][name], ends[3][name])
        for name in names
    )


def _times(run: Trained, reference: Trained, names: set[str], step: int) -> float | None:
    """Give the one factor between all updates of the first step, if there is one."""
    if step != 1 or not names or any(1 not in each.states for each in (run, reference)):
        return None
    factors = []
    for name in names:
        ours = _wide(run.states[1][name] - run.states[0][name]).flatten()
        plain = _wide(reference.states[1][name] - reference.states[0][name]).flatten()
        if not ours.abs().max() or not plain.abs().max():
            return None
        factor = float((ours * plain.conj()).sum().abs() / plain.abs().square().sum())
        if float((ours - factor * plain).abs().max()) > 0.01 * float(ours.abs().max()):
            return None
        factors.append(factor)
    return factors[0] if max(factors) - min(factors) < 0.01 * max(factors) else None
