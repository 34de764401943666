"""
When each rank did what in one step of a pipeline: reports of the ranks, put together.

Times are of the machines' wall clocks, less the first start. On one machine that is one clock; on
several it is as exact as they are set.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

TRACE_FILE = "pipeline_trace.json"


@dataclass(frozen=True)
class TraceEvent:
    """One thing that a rank did."""

    rank: int
    replica: int
    stage: int
    tensor: int
    """Place among the ranks that share the stage's layers."""
    kind: str
    """`F`, `B`, `W`, `send`, `recv` as in a schedule; `reduce`: standing still for the exchange."""
    chunk: int
    """Number of the chunk, among the rank's chunks of layers; -1 for `reduce`."""
    micro_batch: int
    """-1 for `reduce`."""
    start_s: float
    end_s: float


@dataclass(frozen=True)
class TraceReport:
    """One rank's part; times are seconds of its wall clock."""

    rank: int
    step: int
    """From 0."""
    stages: int
    schedule: str
    micro_batches: int
    events: tuple[TraceEvent, ...]


@dataclass(frozen=True)
class Trace:
    """All ranks' parts; times begin with the first event."""

    step: int
    """From 1, as in all summaries."""
    stages: int
    schedule: str
    micro_batches: int
    events: tuple[TraceEvent, ...]

    def to_json(self) -> bytes:
        """Write it as `pipeline_trace.json` has it."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def join_traces(reports: Sequence[TraceReport]) -> Trace:
    """Put the ranks' reports together, in rank order."""
    first = reports[0]
    events = [event for report in reports for event in report.events]
    began = min((event.start_s for event in events), default=0.0)
    moved = (
        replace(event, start_s=event.start_s - began, end_s=event.end_s - began) for event in events
    )
    most = max(report.micro_batches for report in reports)
    return Trace(first.step + 1, first.stages, first.schedule, most, tuple(moved))
