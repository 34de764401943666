"""
One rank of the grid over all attempts of a run: its part, its groups, its pipeline.

Steps are atomic. A rank updates its part only after a barrier confirms that all ranks of the grid
have their summed gradients. So if one rank is at version s + 1, every other remaining rank is too,
or can apply the update by itself. After a failure those ranks catch up
(`AllReduceGradSync.sync_state`), and new ranks copy their part from a peer. For parts on parameter
servers see `grad_sync.py`.

    rank            0     1     2     3
    version         8     7*    7*    lost         * has the summed gradients of step 7
    catch up        8     8     8
    from a peer                       8
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.pipeline_trace import TraceEvent, TraceReport
from distplat.platform.tensor_file import EMA_PREFIX
from distplat.platform.topology import Grid, Position
from distplat.strategies.algorithms.simulate import simulate
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart, Holding
from distplat.strategies.collective import Collective, gather_numbers
from distplat.strategies.loop.compute import Compute, precision
from distplat.strategies.loop.control import ELSEWHERE, StepControl, sum_heads
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.model.ema import with_average
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.meta import on_meta
from distplat.strategies.pipeline.channel import Channel
from distplat.strategies.pipeline.executor import Executor, StageContext, training_plan
from distplat.strategies.pipeline.grad_sync import AllReduceGradSync, PsGradSync
from distplat.strategies.pipeline.hybrid_options import HybridOptions
from distplat.strategies.pipeline.interfaces import GradSync, TraceSpan
from distplat.strategies.pipeline.limits import GradientReach, refuse_weights
from distplat.strategies.pipeline.model_partition import agree_on_part
from distplat.strategies.pipeline.rank_model import ModelPart
from distplat.strategies.pipeline.stage_compute import Pipeline
from distplat.strategies.reduction.base import Meter
from distplat.strategies.task import Task
from distplat.strategies.tensor.parallel_layers import gather_full
from distplat.strategies.tensor.parallelize import reconnect
from distplat.strategies.worker_strategy import Context, WorkerStrategy

_COMPUTING = ("F", "B", "W")


class PipelineMetrics:
    """
    Computes figures and traces of a rank's last step.

    Args:
        rank: in the run.
        position: in the grid.
    """

    def __init__(self, rank: int, position: Position) -> None:
        self._rank, self._position = rank, position
        self._traffic: Meter  #: set by `connect`
        self._reduce: TraceSpan | None = None

    def connect(self, group: Collective) -> None:
        """Set the group of a new attempt, which stages use to send."""
        self._traffic = Meter(group)

    def record_reduce(self, began: float) -> None:
        """Record the time of the gradient exchange, from `began` to now."""
        self._reduce = TraceSpan("reduce", -1, -1, began, time.perf_counter())

    def figures(self, spans: list[TraceSpan], ideal: float) -> dict[str, float]:
        """
        Return the figures of the last step; names and units as in docs/hybrid.md.

        Args:
            spans: executed actions.
            ideal: bubble of the schedule, with stages of equal cost and free messages.
        """
        lap = self._traffic.lap()
        whole = spans[-1].end - spans[0].start if spans else 0.0
        busy = sum(s.end - s.start for s in spans if s.kind in _COMPUTING)
        waits = sum(s.end - s.start for s in spans if s.kind not in _COMPUTING)
        return {
            "pipeline_s": whole,
            "stage_busy_s": busy,
            "bubble_ideal": ideal,
            "stage_wait_s": waits,
            "stage_sent_bytes": lap["sent_bytes"],
            "stage_received_bytes": lap["received_bytes"],
        }

    def trace(self, step: int, spans: list[TraceSpan], schedule: str, stages: int) -> TraceReport:
        """Return the trace of the last step."""
        offset = time.time() - time.perf_counter()
        at = self._position
        where = self._rank, at.replica, at.stage, at.slice
        all_spans = [*spans, *([self._reduce] if self._reduce is not None else [])]
        events = tuple(
            TraceEvent(*where, *span[:3], span.start + offset, span.end + offset)
            for span in all_spans
        )
        micro_batches = 1 + max((span.micro_batch for span in spans), default=-1)
        return TraceReport(self._rank, step, stages, schedule, micro_batches, events)


class HybridWorker(WorkerStrategy[HybridOptions]):
    """Computes a part of the model, and syncs its gradients over the replicas."""

    cuts_model = True
    _part: ModelPart | None = None
    _slices: Collective | None = None
    _grad_sync: GradSync | None = None
    _pipeline: Pipeline  #: set by `setup`

    @override
    def build_model(self, task: Task) -> nn.Module:
        """Build the model, on the meta device if the job says so."""
        refuse_weights(task)
        return task.model() if self.options.init == "build" else on_meta(task.model)

    @override
    def cut_model(
        self, prepared: Prepared, rank: int, collective: Collective | None
    ) -> tuple[FlatModel, Holding]:
        """
        Return this rank's part; ranks agree on the cut points in the first attempt.

        Raises:
            SpecError: the model cannot be cut.
            CollectiveError: a rank is missing.
        """
        assert collective is not None, "roles() asked for a group"
        if self._part is None:
            self._prepared, self._device = prepared, torch.device(prepared.device)
            self._grid: Grid = self.options.grid
            self._position: Position = self._grid.position(rank)
            self._metrics = PipelineMetrics(rank, self._position)
        self._connect_slices(collective)
        part = self._part = agree_on_part(
            self.options, prepared, self._position, collective, self._slices, self._part
        )
        trial, part.trial = part.trial, None  # even if the trial fails because a rank is lost
        if trial is not None:
            trial.compare()
        return part.flat, self._holding

    def _connect_slices(self, everybody: Collective) -> None:
        at = self._position
        if self._grid.slices == 1:
            return
        members = self._grid.slices_of(at.replica, at.stage)
        self._slices = everybody.subgroup(f"slices-{at.replica}-{at.stage}", members)
        if self._part is not None:
            reconnect(self._part.module, self._slices)

    @override
    def setup(self, context: Context) -> int:
        """
        Connect to the other ranks, and bring all parts to the same version.

        Raises:
            CollectiveError: a rank is missing.
            StateLost: a part of the model is on no remaining rank.
        """
        at, grid = self._position, self._grid
        everybody = self._everybody = context.collective
        if self._grad_sync is None:
            self._grad_sync = self._build_grad_sync()
        members = grid.group(at.replica)
        self._replica = everybody.subgroup(f"replica-{at.replica}", members)
        dp_group = None
        if grid.replicas > 1:
            name = f"dp-{at.stage}-{at.slice}"
            dp_group = everybody.subgroup(name, grid.dp_ranks(at.stage, at.slice))
        version = self._grad_sync.sync_state(dp_group, context, self._versions)
        completed, scale = self._grad_sync.completed, self._prepared.loss_scale
        self.replayed = None if completed is None else self._pipeline.share
        if completed is not None and scale is not None:
            scale.update(version - 1, completed)
        self._metrics.connect(self._replica)
        self._pipeline = self._build_pipeline(context, members)
        self._report = context.report
        if self.replayed is not None:
            self._trace(version - 1)
        return version

    def _build_grad_sync(self) -> GradSync:
        options, flat, holding = self.options, self._model_part.flat, self._holding
        if options.data_strategy == "ps-sync":
            return PsGradSync(flat, holding)
        return AllReduceGradSync(
            flat, holding, int(options.bucket_mb * 2**20), overlap=options.overlap
        )

    def _versions(self, version: int) -> list[int]:
        """Gather the versions of all ranks' parts."""
        gathered = gather_numbers([version], self._everybody, self._device)
        return [version for (version,) in gathered]

    def _build_pipeline(self, context: Context, members: tuple[int, ...]) -> Pipeline:
        at, grid, options, device = self._position, self._grid, self.options, self._device
        row = [grid.rank(Position(at.replica, stage, at.slice)) for stage in range(grid.stages)]
        peers = [members.index(rank) for rank in row]
        channel = Channel(self._replica, peers, members, device)
        part = self._model_part
        stage_context = StageContext(
            part.chunks,
            at.stage,
            grid.stages,
            channel,
            lambda: precision(context.job, device),
            context.alive,
            part.flat,
        )
        reach = GradientReach(part.module, self._prepared.task, part.names)
        self._executor = Executor(stage_context, reach)
        return Pipeline(self._prepared, options, at, self._executor, self._sync)

    @override
    def compute(self, prepared: Prepared, context: Context) -> Compute:
        """Return this rank's part of the pipeline."""
        return self._pipeline

    @override
    def exchange(self, step: int, local: StepControl) -> StepControl:
        """
        Sum the gradients of a step over the peers; return when all ranks of the grid have done so.

        Args:
            step: current step.
            local: this rank's control record.

        Returns:
            The sum of all ranks' records, with `present` of this part of the model.

        Raises:
            CollectiveError: a rank is missing.
        """
        began = time.perf_counter()
        record = self._sync.begin(step, local)
        total = self._sync.sum_gradients(step, self._sum_records(record))
        clips = self._prepared.job.clip_norm is not None
        self._sync.prepare_update(self._global_norm() if clips else None)
        if self._grid.replicas > 1:
            self._everybody.barrier()
        self._metrics.record_reduce(began)
        return total

    def _sum_records(self, record: StepControl) -> StepControl:
        """Sum the records of all ranks, without the parameter: slots differ between parts."""
        total = sum_heads(record, self._everybody, self._device)
        if total.slot >= 0:
            total = replace(total, slot=ELSEWHERE)
        return total.named(record)

    def _global_norm(self) -> float:
        """Return the 2-norm over all parts; tensors that several slices hold count once."""
        square = self._sync.squared_norm()
        total = torch.tensor([square], dtype=torch.float64, device=self._device)
        self._replica.all_reduce(total)
        return math.sqrt(float(total))

    @override
    def update(self, step: int, total: StepControl) -> None:
        """Update this rank's part, and report the trace if it is the traced step."""
        self._sync.update(step, total)
        self._trace(step)

    @override
    def figures(self) -> dict[str, float]:
        """Return the figures of pipeline and gradient sync."""
        figures = self._sync.figures()
        if self.options.pipeline > 1:
            figures |= self._metrics.figures(self._executor.spans, self._ideal)
        return figures

    @cached_property
    def _ideal(self) -> float:
        """Bubble of the schedule for a full batch."""
        options, micro_batches = self.options, self.options.micro(self._prepared.job)
        name, stages = options.schedule, options.pipeline
        return simulate(training_plan(name, stages, micro_batches, options.chunks)).bubble

    def _trace(self, step: int) -> None:
        """Report the trace of the last step, if it is the traced step."""
        options, spans = self.options, self._executor.spans
        trace_step = min(options.trace_step, self._prepared.total_steps) - 1
        if step == trace_step and options.pipeline > 1:
            self._report(self._metrics.trace(step, spans, options.schedule, options.pipeline))

    @override
    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """
        Return this rank's part of the model; the first slice returns all slices, the others none.

        Raises:
            CollectiveError: a rank is missing.
        """
        state, specs = flat.model.state_dict(), self._model_part.specs
        if self._prepared.job.ema is not None:
            state = with_average(flat, self.average())
            specs = specs | {EMA_PREFIX + name: spec for name, spec in specs.items()}
        if self._slices is not None:
            state = gather_full(state, specs, self._slices)
        # A rank that exits drops its sent messages that are not yet received.
        self._everybody.barrier()
        return state

    @override
    def average(self) -> Tensor:
        """Return the average of this rank's part."""
        return self._sync.average()

    @override
    def checkpoint(self, version: int) -> CheckpointPart:
        """Return this rank's part for a checkpoint; empty unless in the first replica."""
        return CheckpointPart() if self._position.replica > 0 else self._sync.part(version)

    @property
    def _holding(self) -> Holding:
        """Position of this rank's part in the whole model."""
        return self._model_part.holding(self._position.slice)

    @property
    def _sync(self) -> GradSync:
        assert self._grad_sync is not None, "setup() comes first"
        return self._grad_sync

    @property
    def _model_part(self) -> ModelPart:
        assert self._part is not None, "cut_model() comes first"
        return self._part
