"""
One rank of the grid over all attempts of a run: its part, its groups, its pipeline.

Why no step is half made. A rank updates its part only when all ranks of the grid have their summed
gradients: they say so in a barrier. So if one rank has version s + 1, every other rank that is left
has it too, or can make it by itself from what it holds. After a failure those do
(`AllReduceGradSync.sync_state`); new ranks then take their part from a rank that has the same one.
Parts that servers keep: see `grad_sync.py`.

    rank            0     1     2     3
    version         8     7*    7*    lost         * summed gradients of step 7 are there
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
from distplat.strategies.pipeline.model_partition import agreed_part
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
    Makes figures and traces of what a rank did in its last step.

    Args:
        rank: in the run.
        at: in the grid.
    """

    def __init__(self, rank: int, at: Position) -> None:
        self._rank, self._at = rank, at
        self._sending: Meter  #: there after `connect`
        self._reduce: TraceSpan | None = None

    def connect(self, group: Collective) -> None:
        """Take the group of a new attempt, over which stages send."""
        self._sending = Meter(group)

    def reduced(self, began: float) -> None:
        """Note that the rank stood still for the exchange since then."""
        self._reduce = TraceSpan("reduce", -1, -1, began, time.perf_counter())

    def figures(self, spans: list[TraceSpan], ideal: float) -> dict[str, float]:
        """
        Give the figures of the step just made; names and units as in docs/hybrid.md.

        Args:
            spans: what was done.
            ideal: bubble of the schedule, with stages of equal cost and messages that cost nothing.
        """
        lap = self._sending.lap()
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
        """Tell when what was done in the step just made."""
        offset = time.time() - time.perf_counter()
        where = self._rank, self._at.replica, self._at.stage, self._at.slice
        every = [*spans, *([self._reduce] if self._reduce is not None else [])]
        events = tuple(
            TraceEvent(*where, *span[:3], span.start + offset, span.end + offset) for span in every
        )
        micro_batches = 1 + max((span.micro_batch for span in spans), default=-1)
        return TraceReport(self._rank, step, stages, schedule, micro_batches, events)


class HybridWorker(WorkerStrategy[HybridOptions]):
    """Compute a part of the model, and sum its gradients over the replicas."""

    cuts_model = True
    _part: ModelPart | None = None
    _slices: Collective | None = None
    _grad_sync: GradSync | None = None
    _pipeline: Pipeline  #: there after `setup`

    def build_model(self, task: Task) -> nn.Module:
        """Build the model, without values if the job says so."""
        refuse_weights(task)
        return task.model() if self.options.init == "build" else on_meta(task.model)

    def cut_model(
        self, prepared: Prepared, rank: int, collective: Collective | None
    ) -> tuple[FlatModel, Holding]:
        """
        Give this rank's part; where the model is cut is agreed in the first attempt.

        Raises:
            SpecError: the model cannot be cut so.
            CollectiveError: a rank is missing.
        """
        assert collective is not None, "roles() asked for a group"
        if self._part is None:
            self._prepared, self._device = prepared, torch.device(prepared.device)
            self._grid: Grid = self.options.grid
            self._at: Position = self._grid.position(rank)
            self._measures = PipelineMetrics(rank, self._at)
        self._connect_slices(collective)
        part = self._part = agreed_part(
            self.options, prepared, self._at, collective, self._slices, self._part
        )
        trial, part.trial = part.trial, None  # the part is there, whoever is lost in the trial
        if trial is not None:
            trial.compare()
        return part.flat, self._holding

    def _connect_slices(self, everybody: Collective) -> None:
        at = self._at
        if self._grid.slices == 1:
            return
        members = self._grid.slices_of(at.replica, at.stage)
        self._slices = everybody.subgroup(f"slices-{at.replica}-{at.stage}", members)
        if self._part is not None:
            reconnect(self._part.module, self._slices)

    def setup(self, context: Context) -> int:
        """
        Meet the other ranks, and bring all parts to one version.

        Raises:
            CollectiveError: a rank is missing.
            StateLost: no rank that is left has some part.
        """
        at, grid = self._at, self._grid
        everybody = self._everybody = context.collective
        if self._grad_sync is None:
            self._grad_sync = self._make_grad_sync()
        members = grid.group(at.replica)
        self._replica = everybody.subgroup(f"replica-{at.replica}", members)
        dp_group = None
        if grid.replicas > 1:
            name = f"dp-{at.stage}-{at.slice}"
            dp_group = everybody.subgroup(name, grid.dp_ranks(at.stage, at.slice))
        version = self._grad_sync.sync_state(dp_group, context, self._versions)
        made, scale = self._grad_sync.made, self._prepared.loss_scale
        self.replayed = None if made is None else self._pipeline.share
        if made is not None and scale is not None:
            scale.passed(version - 1, made)
        self._measures.connect(self._replica)
        self._pipeline = self._make_pipeline(context, members)
        self._report = context.report
        if self.replayed is not None:
            self._trace(version - 1)
        return version

    def _make_grad_sync(self) -> GradSync:
        options, flat, holding = self.options, self._own.flat, self._holding
        if options.data_strategy == "ps-sync":
            return PsGradSync(flat, holding)
        return AllReduceGradSync(
            flat, holding, int(options.bucket_mb * 2**20), overlap=options.overlap
        )

    def _versions(self, mine: int) -> list[int]:
        """Ask all ranks for the version of their part."""
        return [one for (one,) in gather_numbers([mine], self._everybody, self._device)]

    def _make_pipeline(self, context: Context, members: tuple[int, ...]) -> Pipeline:
        at, grid, options, device = self._at, self._grid, self.options, self._device
        row = [grid.rank(Position(at.replica, stage, at.slice)) for stage in range(grid.stages)]
        peers = [members.index(rank) for rank in row]
        channel = Channel(self._replica, peers, members, device)
        chunks = self._own.chunks
        stage_context = StageContext(
            chunks,
            at.stage,
            grid.stages,
            channel,
            lambda: precision(context.job, device),
            context.alive,
            self._own.flat,
        )
        self._executor = Executor(
            stage_context, GradientReach(self._own.module, self._prepared.task, self._own.names)
        )
        return Pipeline(self._prepared, options, at, self._executor, self._synced)

    def compute(self, prepared: Prepared, context: Context) -> Compute:
        """Give this rank's part of the pipeline."""
        return self._pipeline

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """
        Sum the gradients of a step over the peers; return when every rank of the grid has done so.

        Args:
            step: the present one.
            local: this rank's control record.

        Returns:
            The records of all ranks, summed; `present` is that of this part of the model.

        Raises:
            CollectiveError: a rank is missing.
        """
        began = time.perf_counter()
        record = self._synced.begin(step, local)
        total = self._synced.sum_gradients(step, self._sum_of_all(record))
        clips = self._prepared.job.clip_norm is not None
        self._synced.ready(self._whole_norm() if clips else None)
        if self._grid.replicas > 1:
            self._everybody.barrier()
        self._measures.reduced(began)
        return total

    def _sum_of_all(self, mine: StepControl) -> StepControl:
        """Add the records of all ranks up; every part of the model has parameters of its own."""
        total = sum_heads(mine, self._everybody, self._device)
        if total.slot >= 0:
            total = replace(total, slot=ELSEWHERE)
        return total.named(mine)

    def _whole_norm(self) -> float:
        """Give the 2-norm over all parts; what several slices hold is counted once."""
        squares = self._synced.squares()
        whole = torch.tensor([squares], dtype=torch.float64, device=self._device)
        self._replica.all_reduce(whole)
        return math.sqrt(float(whole))

    def update(self, step: int, total: StepControl) -> None:
        """Update this rank's part, and report the trace of the step that the job names."""
        self._synced.update(step, total)
        self._trace(step)

    def figures(self) -> dict[str, float]:
        """Give the figures of pipeline and exchange."""
        figures = self._synced.figures()
        if self.options.pipeline > 1:
            figures |= self._measures.figures(self._executor.spans, self._ideal)
        return figures

    @cached_property
    def _ideal(self) -> float:
        """Bubble of the schedule with a full batch."""
        options, micro_batches = self.options, self.options.micro(self._prepared.job)
        name, stages = options.schedule, options.pipeline
        return simulate(training_plan(name, stages, micro_batches, options.chunks)).bubble

    def _trace(self, step: int) -> None:
        """Report when what was done in the step just made, if it is the one."""
        options, spans = self.options, self._executor.spans
        wanted = min(options.trace_step, self._prepared.total_steps) - 1
        if step == wanted and options.pipeline > 1:
            self._report(self._measures.trace(step, spans, options.schedule, options.pipeline))

    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """
        Give this rank's part of the model; of slices the first gives all of them, the others none.

        Raises:
            CollectiveError: a rank is missing.
        """
        state, specs = flat.model.state_dict(), self._own.specs
        if self._prepared.job.ema is not None:
            state = with_average(flat, self.average())
            specs = specs | {EMA_PREFIX + name: spec for name, spec in specs.items()}
        if self._slices is not None:
            state = gather_full(state, specs, self._slices)
        # Who leaves takes with it what it has sent and nobody has read yet.
        self._everybody.barrier()
        return state

    def average(self) -> Tensor:
        """Give that of this rank's part; its optimizer has it, or the part's servers."""
        return self._synced.average()

    def checkpoint(self, version: int) -> CheckpointPart:
        """Give this rank's part for a checkpoint: those of the first replica give theirs."""
        return CheckpointPart() if self._at.replica > 0 else self._synced.part(version)

    @property
    def _holding(self) -> Holding:
        """What of the whole model this rank has."""
        return self._own.holding(self._at.slice)

    @property
    def _synced(self) -> GradSync:
        assert self._grad_sync is not None, "setup() comes first"
        return self._grad_sync

    @property
    def _own(self) -> ModelPart:
        assert self._part is not None, "cut_model() comes first"
        return self._part
