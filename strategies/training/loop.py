"""
The step loop of one worker, the same under every strategy.

    for each step:   batches -> forward, backward (per micro-batch) -> exchange -> update
                     `data`     `compute`                               `exchange` `update`

A rank's loss is weighted by its share of the global batch before backward, so the *sum* over ranks
and micro-batches is the gradient of the global batch's mean, however uneven the parts are.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distplat.platform.cut import even_bounds
from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.base import Strategy
from distplat.strategies.sparse.lookups import Lookups
from distplat.strategies.task import Task
from distplat.strategies.training.batches import eval_batches, micro_batches
from distplat.strategies.training.flat import FlatModel


@dataclass
class Progress:
    """Where a worker is; read by other threads, written by the loop alone."""

    step: int = 0
    """Steps done; the step under way has this number."""
    beats: int = 0
    """Micro-batches and steps done: grows while the worker works, even on no samples."""

    def beat(self) -> None:
        """Show that the worker is at work."""
        self.beats += 1


@dataclass
class Loop:
    """
    Trains one worker's model.

    Everything that is reported goes through `report`, which must be quick and may be called from
    this thread only.
    """

    job: Job
    task: Task
    data: Dataset[Any]
    eval_data: Dataset[Any] | None
    flat: FlatModel
    sampler: Sampler
    total_steps: int
    strategy: Strategy[Any]
    rank: int
    report: Callable[[StepReport | EvalReport], None]
    progress: Progress
    start: int = 0
    """Steps that were made before."""
    lookups: Lookups | None = None
    """The model's embedding tables, if it has some."""

    def run(self) -> None:
        """Train from the first step that is left to the last, with the evaluations between."""
        self.progress.step = self.start
        if self.start and self.eval_data is not None and self._evaluates_after(self.start - 1):
            self._evaluate(self.eval_data, self.start)  # it may have been cut off
        steps = range(self.start, self.total_steps)
        batches = micro_batches(self.job, self.data, self.sampler, self.rank, steps)
        for step in steps:
            if self.strategy.skips(step):
                self._skip(step, batches)
            else:
                self._step(step, batches)
            if self.eval_data is not None and self._evaluates_after(step):
                self.strategy.synchronize()
                self._evaluate(self.eval_data, step + 1)
        self.strategy.synchronize()

    def _step(self, step: int, batches: Iterator[Any]) -> None:
        torch.manual_seed(_step_seed(self.job.seed, step, self.rank))
        self.flat.model.train()
        self.flat.grads.zero_()
        clock = _Stopwatch()
        sizes = [len(ids) for ids in self._plan(step)]
        share = 1.0 / self.sampler.batch_size(step)
        loss_sum = 0.0
        for number, size in enumerate(sizes, 1):
            inputs, targets = self._to_device(next(batches))
            clock.lap("data")
            loss = self._loss(inputs, targets)
            if number == len(sizes):
                self.strategy.last_backward(step)
            torch.autograd.backward(loss * (size * share))
            loss_sum += loss.item() * size
            self.progress.beats += 1
            clock.lap("compute")
        sent = self.lookups.push(step) if self.lookups is not None else None
        self.strategy.exchange(step)
        if sent is not None:
            sent.wait()  # before the update: a rank past a step knows that the tables are
        clock.lap("exchange")
        self.strategy.update(step)
        clock.lap("update")
        self._end_step(step, loss_sum, sum(sizes), clock)

    def _end_step(self, step: int, loss_sum: float, samples: int, clock: "_Stopwatch") -> None:
        self.flat.version = self.progress.step = step + 1
        self.progress.beats += 1
        mean = loss_sum / samples if samples else 0.0
        epoch = self.sampler.epoch_of(step)
        figures = self.strategy.figures()
        if self.lookups is not None:
            figures = {**figures, **self.lookups.figures()}
        self.report(
            StepReport(
                self.rank, step, epoch, mean, samples, clock.seconds, self.total_steps, figures
            )
        )

    def _skip(self, step: int, batches: Iterator[Any]) -> None:
        """Leave a step out: the others have made it."""
        clock = _Stopwatch()
        for _ in self._plan(step):
            next(batches)
        clock.lap("data")
        self._end_step(step, 0.0, 0, clock)

    def _plan(self, step: int) -> list[Any]:
        return self.sampler.micro_batches(step, self.rank, self.job.gradient_accumulation)

    def _loss(self, inputs: Any, targets: Any) -> Tensor:
        with self._precision():
            loss = self.task.loss(self.flat.model(inputs), targets)
        if loss.ndim != 0:
            raise ValueError(
                f"loss() must return a scalar, the mean over the batch; got shape {[*loss.shape]}"
            )
        return loss

    def _evaluates_after(self, step: int) -> bool:
        if step + 1 == self.total_steps:
            return True
        every = self.job.evaluation.every_epochs * self.sampler.steps_per_epoch
        return every > 0 and (step + 1) % every == 0

    @torch.no_grad()
    def _evaluate(self, data: Any, step: int) -> None:
        """Run this rank's part of the evaluation data; the controller puts the parts together."""
        self.flat.model.eval()
        start, stop = even_bounds(len(data), self.job.scaling.world)[self.rank]
        sums: dict[str, float] = {}
        for batch, size in eval_batches(self.job, data, range(start, stop)):
            inputs, targets = self._to_device(batch)
            with self._precision():
                outputs = self.flat.model(inputs)
                loss = self.task.loss(outputs, targets)
                figures = {"loss": loss, **self.task.metrics(outputs, targets)}
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + float(value) * size
            self.progress.beats += 1
        mine = EvalReport(self.rank, step, stop - start, sums)
        for data in self.strategy.gather(json.dumps(asdict(mine)).encode()):
            self.report(EvalReport(**json.loads(data)))

    def _precision(self) -> AbstractContextManager[object]:
        if self.job.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.flat.params.device.type, dtype=torch.bfloat16)

    def _to_device(self, batch: Any) -> tuple[Any, Any]:
        """Take a collated (inputs, targets) apart and move its tensors to the model's device."""
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ValueError("a sample of train_data must be a pair (inputs, targets)")
        device = self.flat.params.device
        return _move(batch[0], device), _move(batch[1], device)


class _Stopwatch:
    """Wall time by part of a step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("data", "compute", "exchange", "update"), 0.0)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap towards `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def _move(value: Any, device: torch.device) -> Any:
    """Move tensors, alone or in lists, tuples and mappings, to a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_move(item, device) for item in value)
    return value


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed dropout and its like by step and rank: a repeated step draws the same numbers."""
    return (seed * 1_000_003 + step * 4_099 + rank) % (1 << 63)
