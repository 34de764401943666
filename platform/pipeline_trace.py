"""
Traces of one pipeline step: when each rank did what, merged from the ranks' reports.

Times are wall-clock times of the machines, relative to the first event. Across machines they are as
precise as the machines' clocks are synchronized.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

TRACE_FILE = "pipeline_trace.json"


@dataclass(frozen=True)
class TraceEvent:
    """One action of a rank."""

    rank: int
    replica: int
    stage: int
    tensor: int
    """Index among the ranks that share the stage's layers."""
    kind: str
    """`F`, `B`, `W`, `send`, `recv` as in a schedule; `reduce`: waiting for the exchange."""
    chunk: int
    """Index among the rank's chunks of layers; -1 for `reduce`."""
    micro_batch: int
    """-1 for `reduce`."""
    start_s: float
    end_s: float


@dataclass(frozen=True)
class TraceReport:
    """One rank's part of a trace; times are seconds of its wall clock."""

    rank: int
    step: int
    """Step, from 0."""
    stages: int
    schedule: str
    micro_batches: int
    events: tuple[TraceEvent, ...]


@dataclass(frozen=True)
class Trace:
    """A trace of all ranks; times start at the first event."""

    step: int
    """Step, from 1, as in all summaries."""
    stages: int
    schedule: str
    micro_batches: int
    events: tuple[TraceEvent, ...]

    def to_json(self) -> bytes:
        """Serialize the trace for `pipeline_trace.json`."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def join_traces(reports: Sequence[TraceReport]) -> Trace:
    """Merge the ranks' reports, in rank order."""
    first = reports[0]
    events = [event for report in reports for event in report.events]
    start = min((event.start_s for event in events), default=0.0)
    shifted = (
        replace(event, start_s=event.start_s - start, end_s=event.end_s - start) for event in events
    )
    micro_batches = max(report.micro_batches for report in reports)
    return Trace(first.step + 1, first.stages, first.schedule, micro_batches, tuple(shifted))
