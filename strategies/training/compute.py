"""
What a rank computes in a step before anything is exchanged: its share of the gradient.

    WholeModel    this file: the rank has the whole model and a part of each batch
    Pipeline      strategies/pipeline/compute.py: it has some layers and does its part of a schedule

A rank's loss is weighted by its share of the global batch before backward, so the *sum* over ranks
and micro-batches is the gradient of the global batch's mean, however uneven the parts are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distplat.platform.cut import even_bounds
from distplat.platform.spec import Job
from distplat.strategies.base import Strategy
from distplat.strategies.task import Task
from distplat.strategies.training.batches import eval_batches, micro_batches

if TYPE_CHECKING:
    from distplat.strategies.training.session import Prepared


class Stopwatch:
    """Wall time by part of a step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("data", "compute", "exchange", "update"), 0.0)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap towards `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def move(self, part: str, to: str, seconds: float) -> None:
        """Count some of a part's time towards another."""
        self.seconds[part] -= seconds
        self.seconds[to] += seconds


@dataclass(frozen=True)
class Share:
    """What a rank's part of a step came to."""

    loss_sum: float = 0.0
    """Over the samples."""
    samples: int = 0
    """Each sample of a step is counted on one rank."""


@dataclass
class Sums:
    """Figures of evaluation batches, added up."""

    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, figures: Mapping[str, Tensor | float], size: int) -> None:
        """Take the means over a batch of so many samples."""
        self.samples += size
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value) * size


class Compute(Protocol):
    """One rank's computing; the loop calls it, strategies that cut the model bring their own."""

    def start(self, steps: range) -> None:
        """Begin to read the data of these steps; once, before the first of them."""

    def gradients(self, step: int, clock: Stopwatch) -> Share:
        """Fill `flat.grads`, which is zero, with this rank's share, and `flat.present`."""

    def skip(self, step: int) -> None:
        """Pass over the data of a step."""

    def evaluate(self, data: Dataset[Any]) -> Sums:
        """Run this rank's part of the evaluation data."""


class WholeModel:
    """
    Forward and backward of the whole model, one micro-batch after the other.

    Args:
        prepared: model and data.
        strategy: told when the last backward of a step begins.
        rank: this one.
        alive: called after each micro-batch.
    """

    def __init__(
        self, prepared: Prepared, strategy: Strategy[Any], rank: int, alive: Callable[[], None]
    ) -> None:
        self.job, self.task, self.data = prepared.job, prepared.task, prepared.data
        self.flat, self.sampler = prepared.flat, prepared.sampler
        self.strategy, self.rank, self.alive = strategy, rank, alive

    def start(self, steps: range) -> None:
        """See `Compute`."""
        parts = self.job.gradient_accumulation
        self._batches = micro_batches(self.job, self.data, self.sampler, self.rank, steps, parts)

    def gradients(self, step: int, clock: Stopwatch) -> Share:
        """See `Compute`."""
        torch.manual_seed(step_seed(self.job.seed, step, self.rank))
        self.flat.model.train()
        sizes = [len(ids) for ids in self._plan(step)]
        weight = 1.0 / self.sampler.batch_size(step)
        loss_sum = 0.0
        for number, size in enumerate(sizes, 1):
            inputs, targets = to_device(next(self._batches), self.flat.params.device)
            clock.lap("data")
            with precision(self.job, self.flat.params.device):
                loss = checked_loss(self.task, self.flat.model(inputs), targets)
            self.flat.before_backward()
            if number == len(sizes):
                self._last_backward(step)
            torch.autograd.backward(loss * (size * weight))
            self.flat.take_in()
            loss_sum += loss.item() * size
            self.alive()
            clock.lap("compute")
        return Share(loss_sum, sum(sizes))

    def skip(self, step: int) -> None:
        """See `Compute`."""
        for _ in self._plan(step):
            next(self._batches)

    @torch.no_grad()
    def evaluate(self, data: Dataset[Any]) -> Sums:
        """See `Compute`."""
        self.flat.model.eval()
        found = Sums()
        for batch, size in self._eval_batches(data):
            inputs, targets = to_device(batch, self.flat.params.device)
            with precision(self.job, self.flat.params.device):
                found.add(eval_figures(self.task, self.flat.model(inputs), targets), size)
            self.alive()
        return found

    def _last_backward(self, step: int) -> None:
        self.strategy.last_backward(step)

    def _plan(self, step: int) -> list[Any]:
        return self.sampler.micro_batches(step, self.rank, self.job.gradient_accumulation)

    def _eval_batches(self, data: Any) -> Iterator[tuple[Any, int]]:
        world = self.job.scaling.world
        start, stop = even_bounds(len(data), world)[self.rank]
        size = max(1, self.job.global_batch_size // world)
        return eval_batches(self.job, data, range(start, stop), size)


def checked_loss(task: Task, outputs: Any, targets: Any) -> Tensor:
    """
    Give the task's loss of one micro-batch.

    Raises:
        ValueError: it is no scalar.
    """
    loss = task.loss(outputs, targets)
    if loss.ndim != 0:
        raise ValueError(
            f"loss() must return a scalar, the mean over the batch; got shape {[*loss.shape]}"
        )
    return loss


def eval_figures(task: Task, outputs: Any, targets: Any) -> dict[str, Tensor | float]:
    """Give loss and metrics of one evaluation batch, means over it."""
    return {"loss": task.loss(outputs, targets), **task.metrics(outputs, targets)}


def precision(job: Job, device: torch.device) -> AbstractContextManager[object]:
    """Give the context in which the job's forwards run."""
    if job.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def to_device(batch: Any, device: torch.device) -> tuple[Any, Any]:
    """
    Take a collated (inputs, targets) apart and move its tensors to a device.

    Raises:
        ValueError: it is no pair.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ValueError("a sample of train_data must be a pair (inputs, targets)")
    return _move(batch[0], device), _move(batch[1], device)


def _move(value: Any, device: torch.device) -> Any:
    """Move tensors, alone or in lists, tuples and mappings, to a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_move(item, device) for item in value)
    return value


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed dropout and its like by step and rank: a repeated step draws the same numbers."""
    return (seed * 1_000_003 + step * 4_099 + rank) % (1 << 63)
