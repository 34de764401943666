"""Forward, backward and evaluation on one rank, before gradients are exchanged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset
from typing_extensions import override

from distplat.platform.even_split import split_evenly
from distplat.platform.spec import Job
from distplat.strategies.loop.batches import (
    EvalLoader,
    Loader,
    SampleRun,
    collate_of,
    fingerprint_of_batch,
    micro_batches,
    note_positions,
    sample_runs,
    unpack_batch,
)
from distplat.strategies.loop.collate import to_device
from distplat.strategies.loop.control import StepControl
from distplat.strategies.loop.gathering import calls
from distplat.strategies.loop.loss_check import MeanCheck
from distplat.strategies.loop.losses import (
    EvalBatch,
    LossTerm,
    Terms,
    TermWeights,
    evaluate_batch,
    run_batch,
    weights_of,
)
from distplat.strategies.loop.metric_states import MetricState, TaskMetrics
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.loop.seeding import seed_evaluation, seed_step
from distplat.strategies.loop.task_settings import task_modules
from distplat.strategies.model.flat import FlatModel


class Stopwatch:
    """Wall time by part of a step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("data", "compute", "exchange", "update"), 0.0)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def move(self, part: str, to: str, seconds: float) -> None:
        """Move seconds from one part to another."""
        self.seconds[part] -= seconds
        self.seconds[to] += seconds


@dataclass(frozen=True)
class Share:
    """One rank's share of a step: its loss, samples and weight."""

    loss_sum: float = 0.0
    """Sum of the loss over the samples, or the sums that loss() returned."""
    samples: int = 0
    """Number of samples; each sample of a step is counted on one rank."""
    weight: float = 0.0
    """Divisor of `loss_sum`: number of samples, or sum of the weights that loss() returned."""
    weighted: bool = False
    """Whether loss() returned weights."""
    batch: int = 0
    """Fingerprint of a stream's batch; 0: this rank has read no samples of the batch."""

    def record(self, rank: int, flat: FlatModel) -> StepControl:
        """
        Return the control record of the step, without checking the gradient.

        Args:
            rank: this rank.
            flat: flat model of this rank, after the step's last backward.
        """
        non_finite = not math.isfinite(self.loss_sum)
        fields = self.samples, self.weight, int(non_finite), rank
        record = StepControl(*fields, unfrozen=flat.unfreezes, present=flat.present)
        return record.of_batch(self.batch)

    @property
    def loss(self) -> float:
        """Mean loss; 0 without samples."""
        return self.loss_sum / self.weight if self.weight else 0.0

    def plus(self, term: LossTerm, samples: int) -> Share:
        """Add a micro-batch."""
        loss = term.total()
        weighted = self.weighted or term.weighted
        weight = self.weight + term.weight
        return Share(self.loss_sum + loss, self.samples + samples, weight, weighted, self.batch)

    def with_fingerprint(self, data: Dataset[Any]) -> Share:
        """Add the fingerprint of the last batch, if this rank had samples."""
        return replace(self, batch=fingerprint_of_batch(data)) if self.samples else self


@dataclass
class Sums:
    """Sums of the metrics of evaluation batches."""

    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    """Total weight of the batches that have the metric, by name: a batch may lack a metric."""
    states: dict[str, MetricState] = field(default_factory=dict)
    """States of metrics with state, by name."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Metric objects with state, by name, during the evaluation."""

    def add(self, batch: EvalBatch, size: int) -> None:
        """Add the metrics of a batch of `size` samples."""
        self.samples += size
        self.kept.update(batch.kept)
        for name, (value, weight) in batch.figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def put(self, figures: Mapping[str, float]) -> None:
        """
        Set metrics that are means over all samples already.

        Raises:
            ValueError: a number has one of the names; names it.
        """
        if taken := sorted(self.sums.keys() & figures):
            raise ValueError(
                f"metrics() gives {taken[0]!r} twice, as a number and as a result of compute(): "
                "give one of them another name"
            )
        self.sums |= figures
        self.counts |= dict.fromkeys(figures, 1.0)

    def merge(self, other: Sums, prefix: str) -> None:
        """
        Add metrics of the same samples, with a prefix to their names.

        Raises:
            ValueError: a metric here has that name already; names it.
        """
        names = {prefix + name for name in (*other.sums, *other.states)}
        if taken := sorted(names & {*self.sums, *self.states}):
            raise ValueError(
                f"metrics() gives {taken[0]!r}, the name of {taken[0].removeprefix(prefix)!r} with "
                "the averaged weights: give it another name"
            )
        self.sums |= {prefix + name: value for name, value in other.sums.items()}
        self.counts |= {prefix + name: weight for name, weight in other.counts.items()}
        self.states |= {prefix + name: state for name, state in other.states.items()}


class Compute(Protocol):
    """Computes one rank's gradients and evaluations; strategies may have their own."""

    def start(self, steps: range) -> None:
        """Start reading the data of these steps; called once, before the first step."""

    def gradients(self, step: int, clock: Stopwatch) -> Share:
        """Accumulate this rank's gradients in `flat.grads` (zero before); set `flat.present`."""

    def skip(self, step: int) -> None:
        """Skip the data of a step."""

    def evaluate(self, data: Dataset[Any]) -> Sums:
        """Evaluate this rank's part of the evaluation data."""


class WholeModel(Compute):
    """
    Forward and backward of an unsharded model, one micro-batch after the other.

    Args:
        prepared: model and data.
        last_backward: called before the last backward of a step.
        rank: this rank.
        alive: called after each micro-batch.
    """

    def __init__(
        self,
        prepared: Prepared,
        last_backward: Callable[[], None],
        rank: int,
        alive: Callable[[], None],
    ) -> None:
        self.job, self.task, self.data = prepared.job, prepared.task, prepared.data
        self.flat, self.sampler = prepared.flat, prepared.sampler
        self.last_backward, self.rank, self.alive = last_backward, rank, alive
        self._modules = [self.flat.model, *task_modules(self.task, self.flat.model)]
        self._mean_check = MeanCheck(self.task, self.flat.model)
        self._evaluated = EvalLoader(self.job, self.task)
        self._scale = prepared.loss_scale
        self._weights, self.metrics = prepared.weights, TaskMetrics(prepared.task)

    @override
    def start(self, steps: range) -> None:
        parts = self.job.gradient_accumulation
        plan = self.sampler, self.rank, steps, parts
        self._batches = micro_batches(self.job, self.data, *plan, collate_of(self.task))

    @override
    def gradients(self, step: int, clock: Stopwatch) -> Share:
        seed_step(self.job.seed, step, self.rank)
        for module in self._modules:
            module.train()
        sizes = [len(ids) for ids in self._plan(step)]
        share, batch_scale = Share(), 1.0 / self.sampler.batch_size(step)
        batches, terms = self._batches, None
        if self._weights is not None:
            batches, terms = self._read_weighted(step, sizes, self._weights)
        for number, size in enumerate(sizes, 1):
            batch, kept = unpack_batch(to_device(next(batches), self.flat.params.device), size)
            kept = kept if terms is None else size  # with `weights`, padding is the task's matter
            clock.lap("data")
            calls_before = calls()
            self._mean_check.begin(step)
            with precision(self.job, self.flat.params.device):
                with self._mean_check.watching(step):
                    result = run_batch(self.task, self.flat.model, batch, kept, terms)
                # Calling a loss with all_gather again would block the other ranks.
                if calls() == calls_before and terms is None:
                    self._mean_check.look(step, result, kept)
            term = result.term
            self.flat.before_backward()
            if number == len(sizes):
                self.last_backward()
            scale = 1.0 if self._scale is None else self._scale.value
            torch.autograd.backward(term.value * (term.factor * batch_scale * scale))
            self.flat.collect()
            share = share.plus(term, size)
            self.alive()
            clock.lap("compute")
        return share.with_fingerprint(self.data)

    def _read_weighted(
        self, step: int, sizes: Sequence[int], weights: TermWeights
    ) -> tuple[Iterator[Any], Terms]:
        """Read the micro-batches of a step, and sum the weights of their terms over all ranks."""
        device = self.flat.params.device
        batches = [unpack_batch(to_device(next(self._batches), device), size)[0] for size in sizes]
        samples = sum(sizes), self.sampler.batch_size(step)
        return iter(batches), weights.of_step(batches, *samples, device)

    @override
    def skip(self, step: int) -> None:
        for _ in self._plan(step):
            next(self._batches)

    @torch.no_grad()
    @override
    def evaluate(self, data: Dataset[Any]) -> Sums:
        seed_evaluation(self.job.seed, self.rank)
        for module in self._modules:
            module.eval()
        self.metrics.begin(self.flat.params.device)
        sums = Sums()
        for batch, size in self._eval_batches(data):
            content, kept = unpack_batch(to_device(batch, self.flat.params.device), size)
            with precision(self.job, self.flat.params.device):
                terms = (
                    None if self._weights is None else Terms(weights_of(self.task, content), size)
                )
                result = run_batch(
                    self.task, self.flat.model, content, kept if terms is None else size, terms
                )
                figures = evaluate_batch(self.task, result, kept)
                sums.add(figures, size)
                self._mean_check.look_at_metrics(result, figures, kept)
            self.alive()
        sums.states = self.metrics.states(sums.kept)
        return sums

    def _plan(self, step: int) -> list[Any]:
        return self.sampler.micro_batches(step, self.rank, self.job.gradient_accumulation)

    def _eval_batches(self, data: Dataset[Any]) -> Iterator[tuple[Any, int]]:
        size = max(1, self.job.global_batch_size // self.job.scaling.world)
        part = self._eval_part(len(data))  # type: ignore[arg-type]
        return self._evaluated.batches(data, part, size)

    def _eval_part(self, samples: int) -> range:
        """Return the positions of this rank's evaluation samples."""
        return range(*split_evenly(samples, self.job.scaling.world)[self.rank])


def precision(job: Job, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of the job's precision."""
    if job.precision == "fp32":
        return nullcontext()
    dtype = torch.float16 if job.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype)


class TaskModel(WholeModel, Compute):
    """
    `WholeModel` for leased tasks: task t is part t % parts of step t // parts.

    Args:
        prepared: model and data; the sampler's world is the number of parts.
        last_backward: called before the last backward of a task.
        alive: called after each micro-batch.
    """

    def __init__(
        self, prepared: Prepared, last_backward: Callable[[], None], alive: Callable[[], None]
    ) -> None:
        super().__init__(prepared, last_backward, 0, alive)
        self._loader: Loader | None = None

    def read(self, tasks: range) -> None:
        """Start reading the data of these tasks; all earlier tasks are done."""
        if not tasks:
            return
        if self._loader is None:
            self._loader = Loader(self.job, self.data, collate_of(self.task), persistent=True)
        self._batches = note_positions(self.data, self._loader.batches(self._runs(tasks)))

    def _runs(self, tasks: range) -> Iterator[SampleRun]:
        for task in tasks:
            step, part = divmod(task, self.sampler.world)
            micro, marked = self.job.gradient_accumulation, self.job.checkpoint.enabled
            yield from sample_runs(self.sampler, step, part, micro, marked=marked)

    def close(self) -> None:
        """Stop the loader's processes, which would outlive this process if it is killed."""
        self._batches, self._loader = iter(()), None

    @override
    def gradients(self, step: int, clock: Stopwatch) -> Share:
        """Compute the gradients of a task; `step` is the task's number."""
        step, self.rank = divmod(step, self.sampler.world)
        return super().gradients(step, clock)

    def evaluate_part(self, data: Dataset[Any], part: int) -> Sums:
        """Evaluate one part of the data, which is split into as many parts as a step has tasks."""
        self.rank = part
        sums = self.evaluate(data)
        sums.put(self.metrics.figures([sums.states]))
        return sums

    @override
    def _eval_part(self, samples: int) -> range:
        if not self.metrics.found():
            return super()._eval_part(samples)
        # Any worker may evaluate a part, so the states of several parts cannot be merged.
        return range(samples if self.rank == 0 else 0)
