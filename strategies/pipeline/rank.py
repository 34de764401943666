"""
One rank of the grid over all attempts of a run: its part, its groups, its pipeline.

Why no step is half made. A rank updates its part only when all ranks of the grid have their summed
gradients: they say so in a barrier. So if one rank has version s + 1, every other rank that is left
has it too, or can make it by itself from what it holds. After a failure those do
(`AllReduceGradSync.meet`); new ranks then take their part from a rank that has the same one. Parts
that servers keep: see `grad_sync.py`.

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
from torch import Tensor

from distplat.platform.pipeline_trace import TraceEvent, TraceReport
from distplat.platform.topology import Grid, Position
from distplat.strategies.algorithms.pipeline_schedule import Plan
from distplat.strategies.algorithms.simulate import simulate
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart, Holding
from distplat.strategies.collective import Collective, Traffic
from distplat.strategies.loop.compute import Share, precision
from distplat.strategies.loop.control import ELSEWHERE, StepControl, sum_heads
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.pipeline.channel import Channel
from distplat.strategies.pipeline.executor import (
    Executor,
    StageContext,
    evaluation_plan,
    training_plan,
)
from distplat.strategies.pipeline.grad_sync import AllReduceGradSync, PsGradSync
from distplat.strategies.pipeline.hybrid_options import HybridOptions
from distplat.strategies.pipeline.interfaces import GradSync, TraceSpan
from distplat.strategies.pipeline.limits import Reached
from distplat.strategies.pipeline.model_partition import agreed_part
from distplat.strategies.pipeline.rank_model import ModelPart
from distplat.strategies.pipeline.stage_compute import Pipeline, StageSettings
from distplat.strategies.tensor.exchange import ReconnectableGroup
from distplat.strategies.tensor.parallel_layers import gather_full
from distplat.strategies.tensor.parallelize import forget
from distplat.strategies.worker_strategy import Context

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
        self._group: Collective | None = None
        self._before = Traffic()
        self._reduce: TraceSpan | None = None

    def meet(self, group: Collective) -> None:
        """Take the group of a new attempt, over which stages send."""
        self._group, self._before = group, Traffic()

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
        assert self._group is not None, "meet() comes first"
        now, before = self._group.traffic, self._before
        self._before = Traffic(now.sent_bytes, now.received_bytes)
        whole = spans[-1].end - spans[0].start if spans else 0.0
        busy = sum(s.end - s.start for s in spans if s.kind in _COMPUTING)
        waits = sum(s.end - s.start for s in spans if s.kind not in _COMPUTING)
        return {
            "pipeline_s": whole,
            "stage_busy_s": busy,
            "bubble_ideal": ideal,
            "stage_wait_s": waits,
            "stage_sent_bytes": float(now.sent_bytes - before.sent_bytes),
            "stage_received_bytes": float(now.received_bytes - before.received_bytes),
        }

    def trace(self, step: int, spans: list[TraceSpan], schedule: str, stages: int) -> TraceReport:
        """Tell when what was done in the step just made."""
        offset = time.time() - time.perf_counter()
        at = self._at
        every = [*spans, *([self._reduce] if self._reduce is not None else [])]
        events = tuple(
            TraceEvent(
                self._rank,
                at.replica,
                at.stage,
                at.slice,
                span.kind,
                span.chunk,
                span.micro_batch,
                span.start + offset,
                span.end + offset,
            )
            for span in every
        )
        micro_batches = 1 + max((span.micro_batch for span in spans), default=-1)
        return TraceReport(self._rank, step, stages, schedule, micro_batches, events)


class PipelineRank:
    """
    What a worker is under `hybrid`.

    Args:
        options: of the strategy.
        prepared: the whole model and the data.
        rank: this worker's.
    """

    def __init__(self, options: HybridOptions, prepared: Prepared, rank: int) -> None:
        self._options, self._prepared = options, prepared
        self._grid: Grid = options.grid
        self._at: Position = self._grid.position(rank)
        self._device = torch.device(prepared.device)
        self._part: ModelPart | None = None
        self._slices: ReconnectableGroup | None = None
        self._grad_sync: GradSync | None = None
        self.replayed: Share | None = None  #: see `WorkerStrategy.replayed`
        self._measures = PipelineMetrics(rank, self._at)
        self.pipeline: Pipeline  #: there once this rank is connected

    def take_part(self, everybody: Collective) -> FlatModel:
        """
        Give this rank's part; where the model is cut is agreed in the first attempt.

        Raises:
            SpecError: the model cannot be cut so.
            CollectiveError: a rank is missing.
        """
        self._meet_slices(everybody)
        part = self._part = agreed_part(
            self._options, self._prepared, self._at, everybody, self._slices, self._part
        )
        trial, part.trial = part.trial, None  # the part is there, whoever is lost in the trial
        if trial is not None:
            trial.compare()
        return part.flat

    def _meet_slices(self, everybody: Collective) -> None:
        at = self._at
        if self._grid.slices == 1:
            return
        members = self._grid.slices_of(at.replica, at.stage)
        group = everybody.subgroup(f"slices-{at.replica}-{at.stage}", members)
        if self._slices is None:
            self._slices = ReconnectableGroup(group)
        self._slices.group = group
        if self._part is not None:
            forget(self._part.module)

    def connect(self, context: Context) -> int:
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
        version = self._grad_sync.meet(dp_group, context, self._versions)
        self.replayed = self.pipeline.share if self._grad_sync.made else None
        self._measures.meet(self._replica)
        self.pipeline = self._make_pipeline(context, members)
        self._report = context.report
        if self.replayed is not None:
            self._trace(version - 1)
        return version

    def _make_grad_sync(self) -> GradSync:
        options, flat, holding = self._options, self._own.flat, self.holding
        if options.data_strategy == "ps-sync":
            return PsGradSync(flat, holding)
        return AllReduceGradSync(
            flat, holding, int(options.bucket_mb * 2**20), overlap=options.overlap
        )

    def _versions(self, mine: int) -> list[int]:
        """Ask all ranks for the version of their part."""
        group = self._everybody
        found = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(group.world)]
        group.all_gather(found, torch.tensor([mine], device=self._device))
        return [int(version) for version in found]

    def _make_pipeline(self, context: Context, members: tuple[int, ...]) -> Pipeline:
        at, grid, options, device = self._at, self._grid, self._options, self._device
        row = [grid.rank(Position(at.replica, stage, at.slice)) for stage in range(grid.stages)]
        peers = [members.index(rank) for rank in row]
        channel = Channel(self._replica, peers, members, device)
        chunks = self._own.chunks
        seat = StageContext(
            chunks,
            at.stage,
            grid.stages,
            channel,
            lambda: precision(context.job, device),
            context.alive,
            self._own.flat,
        )
        self._executor = Executor(
            seat, Reached([self._own.module], self._prepared.task, self._own.names)
        )
        settings = StageSettings(
            at,
            grid.stages,
            grid.replicas,
            options.micro(context.job),
            self._plan,
            lambda count: evaluation_plan(grid.stages, count, options.chunks),
        )
        return Pipeline(self._prepared, settings, self._executor, self._synced)

    def _plan(self, count: int) -> Plan:
        options = self._options
        return training_plan(options.schedule, options.pipeline, count, options.chunks)

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
        mine = self._synced.begin(step, local)
        total = self._synced.sum_gradients(step, self._sum_of_all(mine))
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
        found = self._synced.figures()
        if self._options.pipeline > 1:
            found |= self._measures.figures(self._executor.spans, self._ideal)
        return found

    @cached_property
    def _ideal(self) -> float:
        """Bubble of the schedule with a full batch."""
        return simulate(self._plan(self._options.micro(self._prepared.job))).bubble

    def _trace(self, step: int) -> None:
        """Report when what was done in the step just made, if it is the one."""
        options, spans = self._options, self._executor.spans
        wanted = min(options.trace_step, self._prepared.total_steps) - 1
        if step == wanted and options.pipeline > 1:
            self._report(self._measures.trace(step, spans, options.schedule, options.pipeline))

    def trained(self) -> dict[str, Tensor]:
        """
        Give this rank's part of the model; of slices the first gives all of them, the others none.

        Raises:
            CollectiveError: a rank is missing.
        """
        state = self._own.flat.model.state_dict()
        if self._slices is not None:
            state = gather_full(state, self._own.specs, self._slices)
        # Who leaves takes with it what it has sent and nobody has read yet.
        self._everybody.barrier()
        return state

    def checkpoint(self, version: int) -> CheckpointPart:
        """Give this rank's part for a checkpoint: those of the first replica give theirs."""
        return CheckpointPart() if self._at.replica > 0 else self._synced.part(version)

    @property
    def holding(self) -> Holding:
        """What of the whole model this rank has."""
        return self._own.holding(self._at.slice)

    @property
    def _synced(self) -> GradSync:
        assert self._grad_sync is not None, "connect() comes first"
        return self._grad_sync

    @property
    def _own(self) -> ModelPart:
        assert self._part is not None, "take_part() comes first"
        return self._part
