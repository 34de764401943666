"""
The computation of a pipeline rank in a step (see `loop/compute.py`).

Ranks of the first stage read inputs, ranks of the last stage read targets, others read no data.
Losses are known on the last stage only; each sample is counted once, by the first slice.
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
from distplat.strategies.pipeline.limits import check_inputs, split_batch
from distplat.strategies.task import overrides

_WINDOW = 32
"""Evaluation micro-batches per plan."""


LossOf = Callable[[Any, Any, int, int], Any]
"""Computes the loss of outputs, targets, samples that it averages, and samples read."""


class Pipeline(Compute):
    """
    One rank's part in the steps of its replica.

    Args:
        prepared: data and task.
        options: of the strategy.
        position: of this rank in the grid.
        executor: runs the plans.
        listener: notified when gradients become final.
    """

    def __init__(
        self,
        prepared: Prepared,
        options: HybridOptions,
        position: Position,
        executor: Executor,
        listener: BackwardListener,
    ) -> None:
        self.prepared, self.options, self._position = prepared, options, position
        self._executor, self._listener = executor, listener
        self._micro_batches = options.micro(prepared.job)
        self.device = torch.device(prepared.device)
        self._is_first, self.is_last = position.stage == 0, position.stage == options.pipeline - 1
        self._batches: Iterator[Any] = iter(())
        self._mean_check = MeanCheck(prepared.task, prepared.flat.model)
        self._eval_loader = EvalLoader(prepared.job, prepared.task)
        self._calls = 0  #: calls of `all_gather` before the step
        self._metrics = TaskMetrics(prepared.task)
        self.share = Share()  #: this rank's share of the last step

    @override
    def start(self, steps: range) -> None:
        p, replica = self.prepared, self._position.replica
        if self._is_first or self.is_last:
            plan = p.sampler, replica, steps, self._micro_batches
            self._batches = micro_batches(p.job, p.data, *plan, collate_of(p.task))

    @override
    def gradients(self, step: int, clock: Stopwatch) -> Share:
        p, options, replica = self.prepared, self.options, self._position.replica
        sizes = [len(ids) for ids in p.sampler.micro_batches(step, replica, self._micro_batches)]
        self._executor.spans = []
        self.share = Share()
        if not sizes:
            return self.share
        scale = 1.0 / p.sampler.batch_size(step)
        scale *= 1.0 if p.loss_scale is None else p.loss_scale.value
        terms: list[LossTerm] = []  # in order, as micro-batches reach the last stage

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
        if self.is_last and self._position.slice == 0:
            for term, size in zip(terms, sizes, strict=True):
                self.share = self.share.plus(term, size)
            self.share = self.share.with_fingerprint(p.data)
        return self.share

    def _thorough(self, step: int) -> bool:
        """Return whether the step's parameters are saved, so they are checked thoroughly."""
        state, last = self.prepared.state, self.prepared.total_steps
        return step + 1 == last or (state is not None and state.shares.checkpoint_due(step + 1))

    @override
    def skip(self, step: int) -> None:
        """Pipelines skip no steps."""
        raise NotImplementedError

    @override
    def evaluate(self, data: Dataset[Any]) -> Sums:
        """Micro-batches have the same size as in training, so no more memory is needed."""
        options, sums, replicas = self.options, Sums(), self.options.data
        self._metrics.begin(self.device)
        start, stop = split_evenly(len(data), replicas)[self._position.replica]  # type: ignore[arg-type]
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
            source = _MicroBatches(self, batches, window, add_figures, lambda _: 0)  # seed unused
            plan = evaluation_plan(options.pipeline, len(window), options.chunks)
            self._executor.evaluate(plan, source)
        sums.states = self._metrics.states(sums.kept)
        return sums if self._position.slice == 0 else Sums()

    def _loss_term(self, step: int, outputs: Any, targets: Any, samples: int) -> LossTerm:
        """Return the loss of a micro-batch."""
        with precision(self.prepared.job, self.device):
            term = loss_term(self.prepared.task, outputs, targets, samples)
            # A loss that calls `all_gather` is not a mean over samples and would block other ranks.
            if self._position.slice == 0 and calls() == self._calls:
                self._mean_check.look(step, BatchResult(outputs, targets, term), samples)
            return term

    def _figures(self, outputs: Any, targets: Any, samples: int) -> EvalBatch:
        """Return the figures of an evaluation micro-batch."""
        with precision(self.prepared.job, self.device):
            term = loss_term(self.prepared.task, outputs, targets, samples)
            result = BatchResult(outputs, targets, term)
            figures = evaluate_batch(self.prepared.task, result, samples)
            if self._position.slice == 0:
                self._mean_check.look_at_metrics(result, figures, samples)
            return figures


class _MicroBatches(Source):
    """
    Micro-batches of a plan, loaded in order and on demand.

    Args:
        pipeline: of this rank.
        batches: from a loader.
        sizes: samples of each micro-batch.
        loss_of: computes the loss.
        seed_of: returns the seed of a micro-batch by its number.
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
        self.varies = overrides(type(self._task), "collate")  # collate() may pad
        self._loaded = 0
        self._pairs: dict[int, tuple[Any, Any]] = {}  #: inputs and targets by micro-batch
        self._samples = [*sizes]  #: samples that each loss averages, see `unpack_batch`
        self.loading_s = 0.0

    @override
    def inputs(self, micro_batch: int) -> Any:
        inputs = self.peek(micro_batch)
        if not self._pipeline.is_last:
            del self._pairs[micro_batch]
        return inputs

    @override
    def peek(self, micro_batch: int) -> Any:
        """Checked to be tensors and constants if the model is cut."""
        self._load_up_to(micro_batch)
        inputs = self._pairs[micro_batch][0]
        return check_inputs(inputs) if self._pipeline.options.pipeline > 1 else inputs

    @override
    def loss(self, micro_batch: int, outputs: Any) -> Any:
        self._load_up_to(micro_batch)
        _, targets = self._pairs.pop(micro_batch)
        counts = self._samples[micro_batch], self.sizes[micro_batch]
        return self._loss_of(outputs, targets, *counts)

    @override
    def seed(self, micro_batch: int) -> int:
        return self._seed_of(micro_batch)

    def _load_up_to(self, micro_batch: int) -> None:
        while self._loaded <= micro_batch:
            began, number = time.perf_counter(), self._loaded
            batch, self._samples[number] = unpack_batch(next(self._batches), self.sizes[number])
            self._pairs[number] = split_batch(self._task, to_device(batch, self._pipeline.device))
            self._loaded += 1
            self.loading_s += time.perf_counter() - began
