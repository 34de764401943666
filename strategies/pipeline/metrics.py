"""What a step of the pipeline came to on one rank: its bubble, its messages, its trace."""

from __future__ import annotations

import time

from distplat.platform.grid import Position
from distplat.platform.pipeline_trace import TraceEvent, TraceReport
from distplat.strategies.collective import Collective, Traffic
from distplat.strategies.pipeline.interfaces import TraceSpan

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
