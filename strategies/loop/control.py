"""
The control record: facts of a step, beside the gradients, on which all ranks must agree.

    local   rank 0   samples 4  weight 31.0  present 1 1 0  |
            rank 1   samples 3  weight 17.0  present 1 0 0  |  summed in rank order
    total            samples 7  weight 48.0  present 2 1 0  ▼  the same bits on every rank

The record is one small vector of float64, never compressed. `ring` sums it with the last bucket,
servers sum it from the headers of the pushes. So all ranks and servers make the same decisions
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
"""Length of a packed record before `present`; see `StepControl.head`."""

ELSEWHERE = -2
"""`StepControl.slot` of a gradient on another rank, whose parameter has no name on this rank."""


@dataclass(frozen=True)
class StepControl:
    """
    One rank's record of a step, or the sum of all ranks' records.

    The exchanged gradient is the gradient of the summed losses divided by the global batch size,
    which is equal on all ranks. `scale` turns it into the gradient of the weighted mean.
    """

    samples: float = 0.0
    """Number of samples; in a sum: the global batch size."""
    weight: float = 0.0
    """Divisor of the losses: number of samples, or the weights that loss() returned."""
    non_finite: int = 0
    """Number of ranks with NaN or infinity in their loss or gradient."""
    rank: int = -1
    """Rank with NaN or infinity; -1: none, or several."""
    slot: int = -1
    """First parameter with NaN or infinity on that rank; -1: the loss, or several ranks."""
    state_changed: bool = False
    """Whether a forward has changed buffers or frozen parameters."""
    unfrozen: bool = False
    """Whether a frozen parameter has a gradient, and is trained from this step on."""
    stop: StopOrder = StopOrder.NONE
    """Stop order of this rank; in a sum: the order that all ranks obey after the step. Never
    `ABANDON`."""
    present: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """By slot of the flat vector: whether a backward has reached the parameter."""
    skip: bool = False
    """Whether the step is skipped; set by `NonFiniteSteps.decide`, equally on all ranks."""
    settings: NDArray[np.float64] | None = None
    """Settings of a train function's optimizer, see `OwnLoop`; one rank's, not summed."""
    batch: int = 0
    """Fingerprint of the batch read from a stream, at most 2^32; 0: this rank has read none."""
    readers: int = 0
    """Number of ranks with a fingerprint; 0 in a sum: unknown, or none."""

    @property
    def scale(self) -> float:
        """Factor from the exchanged gradient to that of the weighted mean; 1 for plain means."""
        if self.weight == self.samples or not self.weight:
            return 1.0
        return self.samples / self.weight

    @property
    def finite(self) -> bool:
        """Whether the step may be applied."""
        return not self.non_finite and (self.weight != 0.0 or self.samples == 0.0)

    def of_batch(self, fingerprint: int) -> StepControl:
        """Return a record with the fingerprint of this rank's batch of a stream; 0: none."""
        return replace(self, batch=fingerprint, readers=int(fingerprint > 0))

    def looked_at(self, flat: FlatModel) -> StepControl:
        """Return a record that reports NaN or infinity in this rank's gradient."""
        slot = flat.first_non_finite()
        return self if slot is None else self.broken(slot)

    def broken(self, slot: int) -> StepControl:
        """Return a record that reports a parameter with a non-finite gradient on this rank."""
        return replace(self, non_finite=1, slot=slot)

    def overflowed(self, flat: FlatModel) -> StepControl:
        """Return a record that reports NaN or infinity in the summed gradient."""
        slot = flat.first_non_finite() if self.finite else None
        return self if slot is None else replace(self, non_finite=1, rank=-1, slot=slot)

    def named(self, local: StepControl) -> StepControl:
        """Return a sum that names this rank, if its own record reports a non-finite value."""
        return replace(self, rank=local.rank, slot=local.slot) if local.non_finite else self

    def check_batch(self, local: StepControl, step: int) -> None:
        """
        Check that all ranks have read the same batch of a stream, or have the same sample order.

        If fingerprints differ, their sum differs from the number of ranks times the local one on at
        least one rank.

        Args:
            local: this rank's record.
            step: step, from 0.

        Raises:
            ValueError: the batches differ.
        """
        if local.batch and self.readers and self.batch != self.readers * local.batch:
            raise ValueError(
                f"in step {step + 1} worker-{local.rank} read another batch of a stream than other "
                "workers, or its sampler gave another order: all must read the same samples in the "
                "same order. Sort what glob and listdir give, and cut nothing by rank"
            )

    def pack(self) -> NDArray[np.float64]:
        """Return a vector of shape [12 + slots + settings]; summable without settings."""
        settings = () if self.settings is None else self.settings
        return np.concatenate([self.head, self.present, settings], dtype=np.float64)

    @property
    def head(self) -> tuple[float, ...]:
        """First values of `pack`: all fields but `present`; `unpack` accepts them alone, too."""
        is_non_finite = self.non_finite > 0
        return (
            float(self.samples),
            float(self.weight),
            float(self.non_finite),
            # 1-based, and 0 on finite ranks: with a single non-finite rank, the sum is its value.
            float(self.rank + 1 if is_non_finite else 0),
            float(self.slot + 1 if is_non_finite else 0),
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
        """Read a vector of `pack`, or a sum of vectors; the last `settings` values are settings."""
        head, end = vector[:HEAD_SIZE].tolist(), len(vector) - settings
        samples, weight, count, rank, slot, changed, unfrozen, *stops, batch, readers = head
        orders = zip((StopOrder.RESIZE, StopOrder.END, StopOrder.SAVE), stops, strict=True)
        # The highest stop order of any rank.
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
        """Sum packed records of all ranks, in rank order."""
        summed = vectors[0].copy()
        for vector in vectors[1:]:
            summed += vector
        return cls.unpack(summed)


def sum_heads(local: StepControl, collective: Collective, device: torch.device) -> StepControl:
    """
    Sum the heads of all ranks' records with an all-reduce.

    Args:
        local: this rank's record.
        collective: group of all ranks.
        device: device of the group's tensors.

    Returns:
        The sum, bit-equal on all ranks, with this rank's `present`.
    """
    head = torch.tensor(local.head, dtype=torch.float64, device=device)
    collective.all_reduce(head)
    return replace(StepControl.unpack(head.cpu().numpy()), present=local.present)


def control_size(slots: int, settings: int = 0) -> int:
    """Return the length of `StepControl.pack`."""
    return HEAD_SIZE + slots + settings


class NonFiniteSteps:
    """
    Decides whether non-finite steps are applied; equal decisions on all ranks and servers.

    Args:
        policy: `failure.non_finite` of the job.
        budget: maximum number of skipped steps.
        own_loop: whether the job is a train function.
    """

    def __init__(self, policy: NonFinitePolicy, budget: int, own_loop: bool = False) -> None:
        self._policy, self._budget, self._own_loop = policy, budget, own_loop
        self.skipped = 0
        """Number of steps skipped so far."""

    @classmethod
    def of(cls, job: Job) -> Self:
        """Create the decision rule of a job."""
        return cls(job.failure.non_finite, job.failure.max_skipped_steps, job.own_loop)

    def figures(self) -> dict[str, float]:
        """Return the metric `skipped_steps`, once a step was skipped."""
        return {"skipped_steps": float(self.skipped)} if self.skipped else {}

    @property
    def skips(self) -> bool:
        """Whether non-finite steps are skipped."""
        return self._policy == "skip"

    @property
    def checks(self) -> bool:
        """Whether gradients need to be checked."""
        return self._policy != "ignore"

    def decide(self, total: StepControl, step: int, name: Callable[[int], str]) -> StepControl:
        """
        Decide whether a step is applied or skipped.

        Args:
            total: sum of all ranks' records.
            step: step, from 0.
            name: returns the name of the parameter in a slot.

        Raises:
            NonFiniteError: the policy ends the run.
        """
        if total.finite or self._policy == "ignore":
            return total
        if self._policy == "stop":
            raise NonFiniteError(total.rank, step, _describe(total, name), self._own_loop)
        self.skipped += 1
        if self.skipped > self._budget:
            what = f"{_describe(total, name)}; {self._budget} steps were skipped before"
            raise NonFiniteError(total.rank, step, what)
        return replace(total, skip=True)


def _describe(total: StepControl, name: Callable[[int], str]) -> str:
    if not total.non_finite:
        return "the weights of the losses add up to 0"
    if total.slot >= 0:
        return f"the gradient of {name(total.slot)!r} holds NaN or infinity"
    if total.slot == ELSEWHERE:
        return "the gradient holds NaN or infinity"
    if total.rank >= 0:
        return "the loss is NaN or infinite"
    return f"losses or gradients of {total.non_finite} ranks hold NaN or infinity"
