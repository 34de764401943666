"""
What a rank of a pipeline computes in a step (see `loop/compute.py`).

The first stage's ranks read inputs, the last one's targets, those between no data at all. Losses
are known on the last stage only; each sample is counted by one rank, its first slice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from distplat.platform.even_split import split_evenly
from distplat.platform.topology import Position
from distplat.strategies.algorithms.seeds import derive_seed
from distplat.strategies.loop.batches import EvalLoader, collate_of, micro_batches, unpack_batch
from distplat.strategies.loop.collate import to_device
from distplat.strategies.loop.compute import Compute, Share, Stopwatch, Sums, precision
from distplat.strategies.loop.gathering import calls
from distplat.strategies.loop.loss_check import MeanCheck
from distplat.strategies.loop.losses import (
    BatchResult,
    EvalBatch,
    LossTerm,
    evaluate_batch,
    loss_term,
)
from distplat.strategies.loop.metric_states import TaskMetrics
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.pipeline.executor import Executor, evaluation_plan, training_plan
from distplat.strategies.pipeline.hybrid_options import HybridOptions
from distplat.strategies.pipeline.interfaces import BackwardListener, Source
from distplat.strategies.pipeline.limits import as_pair, check_inputs
from distplat.strategies.task import overrides

_WINDOW = 32
"""Evaluation micro-batches of one plan."""


LossOf = Callable[[Any, Any, int, int], Any]
"""Gives the loss of outputs, targets, samples whose mean it is, and samples that were read."""


class Pipeline(Compute):
    """
    One rank's part in the steps of its replica.

    Args:
        prepared: data and task.
        options: of the strategy.
        at: this rank's position in the grid.
        executor: follows the lists.
        listener: told when gradients become final.
    """

    def __init__(
        self,
        prepared: Prepared,
        options: HybridOptions,
        at: Position,
        executor: Executor,
        listener: BackwardListener,
    ) -> None:
        self.prepared, self.options, self._at = prepared, options, at
        self._executor, self._listener = executor, listener
        self._micro_batches = options.micro(prepared.job)
        self.device = torch.device(prepared.device)
        self._is_first, self.is_last = at.stage == 0, at.stage == options.pipeline - 1
        self._batches: Iterator[Any] = iter(())
        self._mean_check = MeanCheck(prepared.task, prepared.flat.model)
        self._eval_loader = EvalLoader(prepared.job, prepared.task)
        self._calls = 0  #: of `all_gather` before the step
        self._metrics = TaskMetrics(prepared.task)
        self.share = Share()  #: what this rank had of the last step

    @override
    def start(self, steps: range) -> None:
        p, replica = self.prepared, self._at.replica
        if self._is_first or self.is_last:
            plan = p.sampler, replica, steps, self._micro_batches
            self._batches = micro_batches(p.job, p.data, *plan, collate_of(p.task))

    @override
    def gradients(self, step: int, clock: Stopwatch) -> Share:
        p, options, replica = self.prepared, self.options, self._at.replica
        sizes = [len(ids) for ids in p.sampler.micro_batches(step, replica, self._micro_batches)]
        self._executor.spans = []
        self.share = Share()
        if not sizes:
            return self.share
        scale = 1.0 / p.sampler.batch_size(step)
        scale *= 1.0 if p.loss_scale is None else p.loss_scale.value
        terms: list[LossTerm] = []  # in order: so micro-batches come to the last stage

        def loss(outputs: Any, targets: Any, samples: int, size: int) -> Tensor:
            term = self._loss_term(step, outputs, targets, samples)
            terms.append(replace(term, value=term.value.detach()))
            return term.value * (term.factor * scale)

        seed = derive_seed(p.job.seed, step, replica)
        source = _MicroBatches(
            self, self._batches, sizes, loss, lambda number: derive_seed(seed, number)
        )
        plan = training_plan(options.schedule, options.pipeline, len(sizes), options.chunks)
        self._mean_check.begin(step)
        self._calls = calls()
        self._executor.train(plan, source, self._listener, thorough=self._thorough(step))
        clock.lap("compute")
        clock.move("compute", "data", source.loading_s)
        if self.is_last and self._at.slice == 0:
            for term, size in zip(terms, sizes, strict=True):
                self.share = self.share.plus(term, size)
            self.share = self.share.with_fingerprint(p.data)
        return self.share

    def _thorough(self, step: int) -> bool:
        """Say whether what a step trained is kept: then it is looked at."""
        state, last = self.prepared.state, self.prepared.total_steps
        return step + 1 == last or (state is not None and state.shares.checkpoint_due(step + 1))

    @override
    def skip(self, step: int) -> None:
        """Pipelines leave no step out."""
        raise NotImplementedError

    @override
    def evaluate(self, data: Dataset[Any]) -> Sums:
        """Micro-batches are as large as in training, so no more memory is held."""
        options, sums, replicas = self.options, Sums(), self.options.data
        self._metrics.begin(self.device)
        start, stop = split_evenly(len(data), replicas)[self._at.replica]  # type: ignore[arg-type]
        batch_size = self.prepared.job.global_batch_size
        size = max(1, batch_size // (replicas * self._micro_batches))
        sizes = [min(size, stop - first) for first in range(start, stop, size)]
        batches: Iterator[Any] = iter(())
        if self._is_first or self.is_last:
            loaded = self._eval_loader.batches(data, range(start, stop), size)
            batches = (batch for batch, _ in loaded)

        def add_figures(outputs: Any, targets: Any, samples: int, size: int) -> Any:
            sums.add(self._figures(outputs, targets, samples), size)
            return outputs

        for first in range(0, len(sizes), _WINDOW):
            window = sizes[first : first + _WINDOW]
            source = _MicroBatches(self, batches, window, add_figures, lambda _: 0)  # none is drawn
            plan = evaluation_plan(options.pipeline, len(window), options.chunks)
            self._executor.evaluate(plan, source)
        sums.states = self._metrics.states(sums.kept)
        return sums if self._at.slice == 0 else Sums()

    def _loss_term(self, step: int, outputs: Any, targets: Any, samples: int) -> LossTerm:
        """Give the loss of a micro-batch."""
        with precision(self.prepared.job, self.device):
            term = loss_term(self.prepared.task, outputs, targets, samples)
            # Else it is no mean over samples, and the others wait.
            if self._at.slice == 0 and calls() == self._calls:
                self._mean_check.look(step, BatchResult(outputs, targets, term), samples)
            return term

    def _figures(self, outputs: Any, targets: Any, samples: int) -> EvalBatch:
        """Give the figures of an evaluation micro-batch."""
        with precision(self.prepared.job, self.device):
            term = loss_term(self.prepared.task, outputs, targets, samples)
            result = BatchResult(outputs, targets, term)
            figures = evaluate_batch(self.prepared.task, result, samples)
            if self._at.slice == 0:
                self._mean_check.look_at_metrics(result, figures, samples)
            return figures


class _MicroBatches(Source):
    """
    Micro-batches of a plan, read one after the other when they are first wanted.

    Args:
        pipeline: of this rank.
        batches: as a loader gives them.
        sizes: samples of each.
        loss_of: what is made of outputs and targets.
        seed_of: gives the seed of a micro-batch by its number.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        batches: Iterator[Any],
        sizes: Sequence[int],
        loss_of: LossOf,
        seed_of: Callable[[int], int],
    ) -> None:
        self._pipeline, self._batches, self.sizes = pipeline, batches, sizes
        self._loss_of, self._seed_of = loss_of, seed_of
        self._task = pipeline.prepared.task
        self.varies = overrides(type(self._task), "collate")  # which may pad
        self._read = 0
        self._pairs: dict[int, tuple[Any, Any]] = {}  #: inputs and targets
        self._samples = [*sizes]  #: of each micro-batch that is read, see `unpack_batch`
        self.loading_s = 0.0

    @override
    def inputs(self, micro_batch: int) -> Any:
        inputs = self.peek(micro_batch)
        if not self._pipeline.is_last:
            del self._pairs[micro_batch]
        return inputs

    @override
    def peek(self, micro_batch: int) -> Any:
        """Of a model that is cut tensors and constants only."""
        self._read_up_to(micro_batch)
        inputs = self._pairs[micro_batch][0]
        return check_inputs(inputs) if self._pipeline.options.pipeline > 1 else inputs

    @override
    def loss(self, micro_batch: int, outputs: Any) -> Any:
        self._read_up_to(micro_batch)
        _, targets = self._pairs.pop(micro_batch)
        counts = self._samples[micro_batch], self.sizes[micro_batch]
        return self._loss_of(outputs, targets, *counts)

    @override
    def seed(self, micro_batch: int) -> int:
        return self._seed_of(micro_batch)

    def _read_up_to(self, micro_batch: int) -> None:
        while self._read <= micro_batch:
            began, number = time.perf_counter(), self._read
            batch, self._samples[number] = unpack_batch(next(self._batches), self.sizes[number])
            self._pairs[number] = as_pair(self._task, to_device(batch, self._pipeline.device))
            self._read += 1
            self.loading_s += time.perf_counter() - began
