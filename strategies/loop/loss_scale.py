"""
The scale of losses in float16, whose small gradients would be zero: as torch's `GradScaler`.

    every rank    loss x scale, backward: gradients are that much larger
    all ranks     the control record's weight is that much larger, too: what divides the sum of the
                  gradients gives what it would have been
    then          NaN or infinity on any rank: the step is left out, and the scale halved;
                  none in 2000 steps: the scale is doubled

All ranks look at the same sum of records, so they have the same scale.
"""

from __future__ import annotations

import json

import torch

from distplat.platform.errors import Problem, SpecError
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective, gather_bytes
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel

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

    def meet(self, version: int, group: Collective | None, device: torch.device) -> None:
        """
        Have what the others have; every rank calls this when an attempt begins.

        Args:
            version: with which it begins.
            group: all ranks; None: there is one.
            device: of the model.
        """
        known = [self._after]
        if group is not None and group.world > 1:
            texts = gather_bytes(json.dumps(list(self._after.items())).encode(), group, device)
            known = [{step: (one[0], one[1]) for step, one in json.loads(text)} for text in texts]
        there = {step: one for after in reversed(known) for step, one in after.items()}
        # Servers may have made a step of whose outcome no worker was told: that of the one before.
        near = max((step for step in there if step <= version), default=None)
        self.load(version, there[near] if near is not None else (FIRST_SCALE, 0))

    def scaled(self, local: StepControl) -> float:
        """Give the weight of a rank's record, as large as its gradients are."""
        return local.weight * self.value

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
