"""
Comparison of two trainings: the first difference beyond rounding noise, and its likely reason.

The noise floor of a tensor is the largest difference so far between the reference and the same loop
summed in reverse order. It is at least a quarter of a rounding of the tensor's largest element, in
the model's least precise dtype, times the square root of the number of steps. Differences up to
`FACTOR` floors count as rounding; a fault is orders of magnitude larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distplat.strategies.verification.recipes import Trained

FACTOR = 16.0
"""Tolerance in noise floors: the largest difference of a hundred random trainings was 3."""
LOSS = "(loss)"
"""Name of the loss among the names of tensors."""


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a run with its reference."""

    difference: float
    """The largest difference of all tensors and the loss over all steps, relative to its floor."""
    floor: float
    """Noise floor of the same tensor in the same step."""
    diverges: bool
    """Whether the difference is more than rounding."""
    name: str = ""
    """The first tensor that diverges, `(loss)` before all others; else the most different."""
    step: int = 0
    """Step of `name`, from 1."""
    reason: str = ""
    """The likely reason, if the run diverges."""


@dataclass(frozen=True)
class _Gap:
    step: int
    name: str
    difference: float
    floor: float

    @property
    def diverges(self) -> bool:
        return not self.difference <= FACTOR * self.floor  # also for NaN

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
        reversed_: of the plain loop, summed in reverse order.
        trainable: names of the parameters that the reference trains.
        least: minimum floor, relative to a tensor's largest element, or to 1 if that is larger.
    """
    if not is_finite(reference):
        return Comparison(math.nan, 0.0, True, reason="the task itself gives NaN or infinity")
    unmatched = {*final_state(reference)} ^ {*final_state(run)}
    if unmatched:
        name = min(unmatched)
        return Comparison(math.inf, 0.0, True, name, reason="the models have other tensors")
    run = replace(run, states={0: reference.states[0], **run.states})
    gaps = list(_gaps(run, reference, reversed_, least))
    diverging = [gap for gap in gaps if gap.diverges]
    if not diverging:
        worst = max(gaps, key=lambda gap: gap.ratio)
        return Comparison(worst.difference, worst.floor, False, worst.name, worst.step)
    first = min(diverging, key=lambda gap: gap.step)
    names = {gap.name for gap in diverging if gap.step == first.step}
    worst = max(diverging, key=lambda gap: (gap.difference, gap.ratio))
    reason = _reason(run, reference, first, names, trainable)
    return Comparison(worst.difference, worst.floor, True, first.name, first.step, reason)


def final_state(trained: Trained) -> dict[str, Tensor]:
    """Return the trained model's state."""
    return trained.states[max(trained.states)]


def is_finite(trained: Trained) -> bool:
    """Return whether losses and the trained model are finite."""
    values = final_state(trained).values()
    return all(bool(torch.isfinite(value).all()) for value in values) and all(
        map(math.isfinite, trained.losses)
    )


def _gaps(run: Trained, reference: Trained, reversed_: Trained, least: float) -> Sequence[_Gap]:
    floors: dict[str, float] = {}
    gaps = []
    eps = max(map(_eps, reference.states[0].values()), default=0.0)
    for step in range(1, len(reference.losses) + 1):
        losses = [trained.losses[step - 1] for trained in (run, reference, reversed_)]
        drift = eps * math.sqrt(step) / 4
        floor = max(abs(losses[1] - losses[2]), drift * abs(losses[1]))
        floors[LOSS] = floor = max(floor, floors.get(LOSS, 0.0), _least(least, abs(losses[1])))
        gaps.append(_Gap(step, LOSS, abs(losses[0] - losses[1]), floor))
        run_state = run.states.get(step)
        for name, value in reference.states.get(step, {}).items():
            size = _largest(value)
            floor = max(_distance(value, reversed_.states[step][name]), drift * size)
            floor = max(floor, floors.get(name, 0.0), _least(least, size))
            floors[name] = floor
            if run_state is not None:
                gaps.append(_Gap(step, name, _distance(run_state[name], value), floor))
    return gaps


def _least(part: float, size: float) -> float:
    return part * max(1.0, size) / FACTOR


def _eps(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0


def _largest(value: Tensor) -> float:
    return float(_wide(value).abs().max()) if value.numel() else 0.0


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two elements; infinity if shapes differ."""
    if a.shape != b.shape:
        return math.inf
    return _largest(_wide(a) - _wide(b))


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _reason(
    run: Trained, reference: Trained, first: _Gap, names: set[str], trainable: Sequence[str]
) -> str:
    """Return the likely reason, by the names that diverge first; see docs/verify.md."""
    tensors = names - {LOSS}
    if not is_finite(run):
        return "the run gives NaN or infinity where the plain loop does not"
    if LOSS in names and first.step == 1:
        return (
            "the first forward differs: ranks have other samples, buffers or frozen parameters, "
            "or random numbers that the seed does not control"
        )
    if tensors and not tensors & set(trainable):
        return (
            "buffers or frozen parameters are not those of a plain loop: they are not synchronised"
        )
    unused = tensors & set(trainable) - reference.used[first.step - 1]
    if unused and unused == tensors & set(trainable):
        return (
            "parameters without a gradient were updated: weight decay or momentum, where torch "
            "skips them"
        )
    if _stuck(run, reference, tensors):
        return "parameters that a plain loop updates stay unchanged"
    times = _times(run, reference, tensors, first.step)
    if times is not None:
        return f"updates are {times:.3g} times as large: the loss is not a mean, or counts twice"
    if tensors < set(trainable) & reference.used[first.step - 1]:
        return "some gradients are not those of the whole batch: some of it is lost or counts twice"
    return "gradients or updates are not those of a plain loop, in all parameters"


def _stuck(run: Trained, reference: Trained, names: set[str]) -> bool:
    """Return whether the reference changes one of the tensors, and the run does not."""

    def changes(trained: Trained, name: str) -> bool:
        return not torch.equal(trained.states[0][name], final_state(trained)[name])

    return any(not changes(run, name) and changes(reference, name) for name in names)


def _times(run: Trained, reference: Trained, names: set[str], step: int) -> float | None:
    """Return the common factor between all updates of the first step, if there is one."""
    if step != 1 or not names or any(1 not in trained.states for trained in (run, reference)):
        return None
    factors = []
    for name in names:
        update = _wide(run.states[1][name] - run.states[0][name]).flatten()
        expected = _wide(reference.states[1][name] - reference.states[0][name]).flatten()
        if not update.abs().max() or not expected.abs().max():
            return None
        factor = float((update * expected.conj()).sum().abs() / expected.abs().square().sum())
        if float((update - factor * expected).abs().max()) > 0.01 * float(update.abs().max()):
            return None
        factors.append(factor)
    return factors[0] if max(factors) - min(factors) < 0.01 * max(factors) else None
