"""
What a rank of a pipeline computes in a step (see `loop/compute.py`).

The first stage's ranks read inputs, the last one's targets, those between no data at all. Losses
are known on the last stage only; each sample is counted by one rank, its first slice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from distplat.platform.even_split import split_evenly
from distplat.platform.topology import Position
from distplat.strategies.algorithms.seeds import mixed
from distplat.strategies.loop.batches import EvalLoader, batches_by, counted, micro_batches
from distplat.strategies.loop.collate import moved
from distplat.strategies.loop.compute import Compute, Share, Stopwatch, Sums, precision
from distplat.strategies.loop.loss_check import MeanCheck
from distplat.strategies.loop.losses import BatchResult, EvalBatch, LossTerm, judged, loss_term
from distplat.strategies.loop.metric_states import TaskMetrics
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.pipeline.executor import Executor, PlanOf
from distplat.strategies.pipeline.interfaces import BackwardListener, Source
from distplat.strategies.pipeline.limits import as_pair, entering
from distplat.strategies.task import overrides

_WINDOW = 32
"""Evaluation micro-batches of one plan."""


@dataclass(frozen=True)
class StageSettings:
    """Settings of one rank of a pipeline."""

    at: Position
    stages: int
    replicas: int
    micro_batches: int
    """Of a step, at most; a short batch has fewer."""
    training: PlanOf
    evaluation: PlanOf


class Pipeline(Compute):
    """
    One rank's part in the steps of its replica.

    Args:
        prepared: data and task.
        settings: where in the grid.
        executor: follows the lists.
        listener: told when gradients become final.
    """

    def __init__(
        self,
        prepared: Prepared,
        settings: StageSettings,
        executor: Executor,
        listener: BackwardListener,
    ) -> None:
        self._p, self._settings, self._executor, self._listener = (
            prepared,
            settings,
            executor,
            listener,
        )
        self._device = torch.device(prepared.device)
        self._begins = settings.at.stage == 0
        self._ends = settings.at.stage == settings.stages - 1
        self._batches: Iterator[Any] = iter(())
        self._mean_check = MeanCheck(prepared.task, prepared.flat.model)
        self._evaluated = EvalLoader(prepared.job, prepared.task)
        self._metrics = TaskMetrics(prepared.task)
        self.share = Share()  #: what this rank had of the last step

    @override
    def start(self, steps: range) -> None:
        p, s = self._p, self._settings
        if self._begins or self._ends:
            data = batches_by(p.task, p.data)
            self._batches = micro_batches(
                p.job, data, p.sampler, s.at.replica, steps, s.micro_batches
            )

    @override
    def gradients(self, step: int, clock: Stopwatch) -> Share:
        sampler, s = self._p.sampler, self._settings
        plan = sampler.micro_batches(step, s.at.replica, s.micro_batches)
        sizes = [len(ids) for ids in plan]
        self._executor.spans = []
        self.share = Share()
        if not sizes:
            return self.share
        seed = mixed(self._p.job.seed, step, s.at.replica)
        part = 1.0 / sampler.batch_size(step)
        source = _Training(self, step, self._batches, sizes, seed, part)
        self._mean_check.begin(step)
        given = s.training(len(sizes)), source, self._listener
        self._executor.train(*given, thorough=self._thorough(step))
        clock.lap("compute")
        clock.move("compute", "data", source.loading_s)
        if self._ends and s.at.slice == 0:
            for term, size in zip(source.terms, sizes, strict=True):
                self.share = self.share.plus(term, size)
            self.share = self.share.of(self._p.data)
        return self.share

    def _thorough(self, step: int) -> bool:
        """Say whether what a step trained is kept: then it is looked at."""
        state, last = self._p.state, self._p.total_steps
        return step + 1 == last or (state is not None and state.shares.checkpoint_due(step + 1))

    @override
    def skip(self, step: int) -> None:
        """Pipelines leave no step out."""
        raise NotImplementedError

    @override
    def evaluate(self, data: Dataset[Any]) -> Sums:
        """Micro-batches are as large as in training, so no more memory is held."""
        s, found = self._settings, Sums()
        self._metrics.begin(self._device)
        start, stop = split_evenly(len(data), s.replicas)[s.at.replica]  # type: ignore[arg-type]
        size = max(1, self._p.job.global_batch_size // (s.replicas * s.micro_batches))
        sizes = [min(size, stop - at) for at in range(start, stop, size)]
        batches: Iterator[Any] = iter(())
        if self._begins or self._ends:
            loaded = self._evaluated.batches(data, range(start, stop), size)
            batches = (batch for batch, _ in loaded)
        for at in range(0, len(sizes), _WINDOW):
            some = sizes[at : at + _WINDOW]
            source = _EvalSource(self, batches, some, found)
            self._executor.evaluate(s.evaluation(len(some)), source)
        found.states = self._metrics.states(found.kept)
        return found if s.at.slice == 0 else Sums()

    def pair(self, batch: Any) -> tuple[Any, Any]:
        """Take a batch apart, on this rank's device."""
        return as_pair(self._p.task, moved(batch, self._device))

    def differentiated(self, step: int, outputs: Any, targets: Any, samples: int) -> LossTerm:
        """Give the loss of a micro-batch."""
        with precision(self._p.job, self._device):
            term = loss_term(self._p.task, outputs, targets, samples)
            if self._settings.at.slice == 0:
                self._mean_check.look(step, BatchResult(outputs, targets, term), samples)
            return term

    def figures_of(self, outputs: Any, targets: Any, samples: int) -> EvalBatch:
        """Give the figures of an evaluation micro-batch."""
        with precision(self._p.job, self._device):
            term = loss_term(self._p.task, outputs, targets, samples)
            result = BatchResult(outputs, targets, term)
            found = judged(self._p.task, result, samples)
            if self._settings.at.slice == 0:
                self._mean_check.look_at_metrics(result, found, samples)
            return found


class _Loaded(Source):
    """Micro-batches, read one after the other when they are first wanted."""

    def __init__(self, owner: Pipeline, batches: Iterator[Any], sizes: Sequence[int]) -> None:
        self._owner, self._batches, self.sizes = owner, batches, sizes
        self.varies = overrides(type(owner._p.task), "collate")  # which may pad
        self._read = 0
        self._pairs: dict[int, tuple[Any, Any]] = {}
        self.kept = [*sizes]  #: samples of each micro-batch that is read, see `counted`
        self.loading_s = 0.0

    @override
    def inputs(self, micro_batch: int) -> Any:
        inputs = self.peek(micro_batch)
        if not self._owner._ends:
            del self._pairs[micro_batch]
        return inputs

    @override
    def peek(self, micro_batch: int) -> Any:
        """Of a model that is cut tensors and constants only."""
        self._read_up_to(micro_batch)
        inputs = self._pairs[micro_batch][0]
        return entering(inputs) if self._owner._settings.stages > 1 else inputs

    def targets(self, micro_batch: int) -> Any:
        """Give a micro-batch's targets; once."""
        self._read_up_to(micro_batch)
        return self._pairs.pop(micro_batch)[1]

    def _read_up_to(self, micro_batch: int) -> None:
        while self._read <= micro_batch:
            began = time.perf_counter()
            batch, self.kept[self._read] = counted(next(self._batches), self.sizes[self._read])
            self._pairs[self._read] = self._owner.pair(batch)
            self._read += 1
            self.loading_s += time.perf_counter() - began


class _Training(_Loaded, Source):
    """Micro-batches of a step."""

    def __init__(
        self,
        owner: Pipeline,
        step: int,
        batches: Iterator[Any],
        sizes: Sequence[int],
        seed: int,
        part: float,
    ) -> None:
        super().__init__(owner, batches, sizes)
        self._step, self._seed, self._part = step, seed, part
        self.terms: list[LossTerm] = []  #: in order; micro-batches come to the last stage so

    def loss(self, micro_batch: int, outputs: Any) -> Tensor:
        """Give the loss, summed and divided by the global batch."""
        targets = self.targets(micro_batch)
        kept = self.kept[micro_batch]
        term = self._owner.differentiated(self._step, outputs, targets, kept)
        self.terms.append(replace(term, value=term.value.detach()))
        return term.value * (term.factor * self._part)

    @override
    def seed(self, micro_batch: int) -> int:
        return mixed(self._seed, micro_batch)


class _EvalSource(_Loaded, Source):
    """Micro-batches of an evaluation."""

    def __init__(
        self, owner: Pipeline, batches: Iterator[Any], sizes: Sequence[int], found: Sums
    ) -> None:
        super().__init__(owner, batches, sizes)
        self._found = found

    def loss(self, micro_batch: int, outputs: Any) -> Any:
        """Add the figures up."""
        targets = self.targets(micro_batch)
        figures = self._owner.figures_of(outputs, targets, self.kept[micro_batch])
        self._found.add(figures, self.sizes[micro_batch])
        return outputs

    @override
    def seed(self, micro_batch: int) -> int:
        """Nothing is drawn."""
        return 0
