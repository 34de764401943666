"""
The control record: what all ranks must know of a step besides the gradients.

    local   rank 0   samples 4  weight 31.0  present 1 1 0  |
            rank 1   samples 3  weight 17.0  present 1 0 0  |  summed in rank order
    total            samples 7  weight 48.0  present 2 1 0  ▼  the same bits on every rank

It is one small vector of float64, never compressed. `ring` sums it beside the last bucket, servers
sum it from the headers of the pushes, so every rank and every server decides alike
(docs/decisions/control_record.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from distplat.platform.errors import NonFiniteError
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.strategies.collective import Collective
from distplat.strategies.model.flat import FlatModel

NonFinitePolicy = Literal["stop", "skip", "ignore"]
"""`failure.non_finite` of the job."""

HEAD_SIZE = 12
"""Numbers of a packed record before `present`, see `StepControl.head`."""

ELSEWHERE = -2
"""`StepControl.slot` of a gradient that is not this rank's: its parameter has no name here."""


@dataclass(frozen=True)
class StepControl:
    """
    One rank's record of one step, or the sum of those of all ranks.

    The gradient that is exchanged is that of the summed losses divided by the global batch, which
    is equal on all ranks. `scale` makes it that of the weighted mean.
    """

    samples: float = 0.0
    """In the step; of all ranks: the global batch."""
    weight: float = 0.0
    """What the losses are divided by: samples, unless loss() returned weights of its own."""
    non_finite: int = 0
    """Ranks whose loss or gradient holds NaN or infinity."""
    rank: int = -1
    """The one rank that is not finite; -1: none, or several."""
    slot: int = -1
    """Its first parameter that is not finite; -1: the loss, or several ranks."""
    state_changed: bool = False
    """Whether a forward has changed buffers or frozen parameters."""
    unfrozen: bool = False
    """Whether a frozen parameter has a gradient, and is trained from this step on."""
    stop: StopOrder = StopOrder.NONE
    """What this rank was told; of all ranks: what they do after the step. Never `ABANDON`."""
    present: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """By slot of the flat vector: whether a backward has reached the parameter."""
    skip: bool = False
    """Whether the step is left out: decided alike everywhere, by `decided`."""
    settings: NDArray[np.float64] | None = None
    """Of a train function's optimizer, see `OwnLoop`; they are one rank's, and not summed."""
    batch: int = 0
    """Fingerprint of what was read of a stream, at most 2^32; 0: this rank has read none."""
    readers: int = 0
    """Ranks that have one; of a sum 0: it is not known, or nobody."""

    @property
    def scale(self) -> float:
        """Factor that makes the exchanged gradient one of the weighted mean; 1 for plain means."""
        if self.weight == self.samples or not self.weight:
            return 1.0
        return self.samples / self.weight

    @property
    def finite(self) -> bool:
        """Whether the step may be applied."""
        return not self.non_finite and (self.weight != 0.0 or self.samples == 0.0)

    def of_batch(self, fingerprint: int) -> StepControl:
        """Note which batch this rank has read of a stream; 0: none."""
        return replace(self, batch=fingerprint, readers=int(fingerprint > 0))

    def looked_at(self, flat: FlatModel) -> StepControl:
        """Look for NaN and infinity in this rank's gradient, before it is exchanged."""
        slot = flat.first_non_finite()
        return self if slot is None else self.broken(slot)

    def broken(self, slot: int) -> StepControl:
        """Note that the gradient of a parameter is not finite on this rank."""
        return replace(self, non_finite=1, slot=slot)

    def overflowed(self, flat: FlatModel) -> StepControl:
        """Look for NaN and infinity in the summed gradient, the same bits on every rank."""
        slot = flat.first_non_finite() if self.finite else None
        return self if slot is None else replace(self, non_finite=1, rank=-1, slot=slot)

    def named(self, local: StepControl) -> StepControl:
        """Have the sum name this rank, if it is not finite itself."""
        return replace(self, rank=local.rank, slot=local.slot) if local.non_finite else self

    def check_batch(self, local: StepControl, step: int) -> None:
        """
        See whether all ranks have read the same batch of a stream, or have a sampler's same order.

        Where some have not, the sum is not their number times one's own, for one of them at least.

        Args:
            local: the record of one of them.
            step: from 0.

        Raises:
            ValueError: they have not.
        """
        if local.batch and self.readers and self.batch != self.readers * local.batch:
            raise ValueError(
                f"in step {step + 1} worker-{local.rank} read another batch of a stream than other "
                "workers, or its sampler gave another order: all must read the same samples in the "
                "same order. Sort what glob and listdir give, and cut nothing by rank"
            )

    def pack(self) -> NDArray[np.float64]:
        """Give it as a vector, shape [12 + slots + settings]; without settings it can be summed."""
        settings = () if self.settings is None else self.settings
        return np.concatenate([self.head, self.present, settings], dtype=np.float64)

    @property
    def head(self) -> tuple[float, ...]:
        """Give what `pack` begins with: all but `present`; `unpack` reads it, too."""
        broken = self.non_finite > 0
        return (
            float(self.samples),
            float(self.weight),
            float(self.non_finite),
            # Counted from 1, and only by those who are not finite: a sum of one is its number.
            float(self.rank + 1 if broken else 0),
            float(self.slot + 1 if broken else 0),
            float(self.state_changed),
            float(self.unfrozen),
            float(self.stop is StopOrder.RESIZE),
            float(self.stop is StopOrder.END),
            float(self.stop is StopOrder.SAVE),
            float(self.batch),
            float(self.readers),
        )

    @classmethod
    def unpack(cls, vector: NDArray[np.float64], settings: int = 0) -> Self:
        """Read a vector of `pack`, or a sum of such; `settings` of its last values are some."""
        head, end = vector[:HEAD_SIZE].tolist(), len(vector) - settings
        samples, weight, count, rank, slot, changed, unfrozen, *told, batch, readers = head
        orders = zip((StopOrder.RESIZE, StopOrder.END, StopOrder.SAVE), told, strict=True)
        # The largest stop order that any rank was told.
        stop = max((order for order, ranks in orders if ranks), default=StopOrder.NONE)
        return cls(
            samples,
            weight,
            int(count),
            int(rank) - 1 if count == 1 else -1,
            int(slot) - 1 if count == 1 else -1,
            bool(changed),
            bool(unfrozen),
            stop,
            vector[HEAD_SIZE:end] > 0,
            settings=vector[end:] if settings else None,
            batch=int(batch),
            readers=int(readers),
        )

    @classmethod
    def total(cls, vectors: Sequence[NDArray[np.float64]]) -> Self:
        """Add the records of all ranks up, in rank order; `pack` has made them."""
        summed = vectors[0].copy()
        for vector in vectors[1:]:
            summed += vector
        return cls.unpack(summed)


def sum_heads(local: StepControl, collective: Collective, device: torch.device) -> StepControl:
    """
    Add the records of all ranks up by an all-reduce of their own.

    Args:
        local: this rank's.
        collective: all ranks.
        device: where the group takes vectors.

    Returns:
        The sum, the same bits on every rank; but `present` is this rank's.
    """
    head = torch.tensor(local.head, dtype=torch.float64, device=device)
    collective.all_reduce(head)
    return replace(StepControl.unpack(head.cpu().numpy()), present=local.present)


def control_size(slots: int, settings: int = 0) -> int:
    """Give the length of `StepControl.pack` for so many slots and settings."""
    return HEAD_SIZE + slots + settings


class NonFiniteSteps:
    """
    Decides what becomes of steps that are not finite; every rank and server decides alike.

    Args:
        policy: `failure.non_finite` of the job.
        budget: steps that may be skipped.
        own_loop: whether they are a train function's.
    """

    def __init__(self, policy: NonFinitePolicy, budget: int, own_loop: bool = False) -> None:
        self._policy, self._budget, self._own_loop = policy, budget, own_loop
        self.skipped = 0
        """Steps left out so far."""

    @classmethod
    def of(cls, job: Job) -> Self:
        """Take policy and budget from a job."""
        return cls(job.failure.non_finite, job.failure.max_skipped_steps, job.own_loop)

    def figures(self) -> dict[str, float]:
        """Give the steps skipped so far, once there are some."""
        return {"skipped_steps": float(self.skipped)} if self.skipped else {}

    @property
    def skips(self) -> bool:
        """Whether steps may be left out."""
        return self._policy == "skip"

    @property
    def looks(self) -> bool:
        """Whether anybody wants to know."""
        return self._policy != "ignore"

    def decide(self, total: StepControl, step: int, name: Callable[[int], str]) -> StepControl:
        """
        Say whether a step is applied or skipped.

        Args:
            total: the records of all ranks, summed.
            step: from 0.
            name: gives the name of what a slot holds.

        Raises:
            NonFiniteError: the run ends here.
        """
        if total.finite or self._policy == "ignore":
            return total
        if self._policy == "stop":
            raise NonFiniteError(total.rank, step, _finding(total, name), self._own_loop)
        self.skipped += 1
        if self.skipped > self._budget:
            what = f"{_finding(total, name)}; {self._budget} steps were skipped before"
            raise NonFiniteError(total.rank, step, what)
        return replace(total, skip=True)


def _finding(total: StepControl, name: Callable[[int], str]) -> str:
    if not total.non_finite:
        return "the weights of the losses add up to 0"
    if total.slot >= 0:
        return f"the gradient of {name(total.slot)!r} holds NaN or infinity"
    if total.slot == ELSEWHERE:
        return "the gradient holds NaN or infinity"
    if total.rank >= 0:
        return "the loss is NaN or infinite"
    return f"losses or gradients of {total.non_finite} ranks hold NaN or infinity"
