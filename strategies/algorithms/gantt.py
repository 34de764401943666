"""
Comparison of a measured pipeline step with the ideal one.

    measured   F0 F1 .. B0-- F2 . B1--      from `pipeline_trace.json`
    ideal      F0 F1 . B0-- F2 B1--         the same schedule, simulated with each stage's mean
                                            times and free messages

The difference in length is the cost of messages, waits and uneven micro-batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distplat.platform.errors import SpecError
from distplat.platform.pipeline_trace import Trace, TraceEvent
from distplat.strategies.algorithms.pipeline_schedule import (
    Action,
    ActionKind,
    PipelineSchedule,
    build,
)
from distplat.strategies.algorithms.simulate import (
    Costs,
    Simulation,
    Span,
    bubble,
    makespan,
    simulate,
)

BarRows = tuple[tuple[Span, ...], ...]

_COMPUTING = {kind.value: kind for kind in ActionKind}


@dataclass(frozen=True)
class StageTimes:
    """Times of one stage of one replica in the step, in seconds."""

    forward_s: float
    """Mean time of a micro-batch through all chunks of the stage."""
    backward_s: float
    weight_s: float
    """Mean time of a micro-batch if the schedule splits backward, else 0."""
    busy_s: float
    send_s: float
    recv_s: float
    reduce_s: float


@dataclass(frozen=True)
class Gantt:
    """Measured and ideal step of one replica."""

    replica: int
    measured: BarRows
    """Computations of each stage; of the first slice if layers are sliced."""
    communication: tuple[tuple[TraceEvent, ...], ...]
    """Sends, receives and gradient reduction of each stage."""
    times: tuple[StageTimes, ...]
    ideal: Simulation | None
    """None: the schedule cannot be simulated, for the reason in `why_not`."""
    why_not: str = ""

    @property
    def bubble(self) -> float:
        """Measured bubble: fraction of the stages' time without computation."""
        return bubble(self.measured)

    @property
    def least_bubble(self) -> float:
        """Bubble of the busiest stage alone, which excludes imbalance between stages."""
        busiest = max((stage.busy_s for stage in self.times), default=0.0)
        return 1 - busiest / self.pipeline_s if self.pipeline_s else 0.0

    @property
    def pipeline_s(self) -> float:
        """Time from the first start to the last end of all computations."""
        return makespan(self.measured)

    @property
    def step_s(self) -> float:
        """Time of the step including messages and gradient reduction."""
        times = [(s.start, s.end) for row in self.measured for s in row]
        times += [(e.start_s, e.end_s) for row in self.communication for e in row]
        if not times:
            return 0.0
        return max(end for _, end in times) - min(start for start, _ in times)


def gantts(trace: Trace) -> list[Gantt]:
    """
    Return the step of each replica.

    Raises:
        ValueError: the trace is inconsistent, such as an event of a stage that does not exist.
    """
    invalid = [e for e in trace.events if not 0 <= e.stage < trace.stages]
    if invalid:
        raise ValueError(f"an event of stage {invalid[0].stage}, and there are {trace.stages}")
    replicas = sorted({event.replica for event in trace.events})
    return [_gantt(trace, replica) for replica in replicas]


def _gantt(trace: Trace, replica: int) -> Gantt:
    first = min(e.tensor for e in trace.events if e.replica == replica)
    rows: list[list[TraceEvent]] = [[] for _ in range(trace.stages)]
    for event in sorted(trace.events, key=lambda e: (e.start_s, e.end_s)):
        if event.replica == replica and event.tensor == first:
            rows[event.stage].append(event)
    measured = tuple(tuple(_span(e) for e in row if e.kind in _COMPUTING) for row in rows)
    communication = tuple(tuple(e for e in row if e.kind not in _COMPUTING) for row in rows)
    try:
        schedule = _schedule(trace)
        times = tuple(map(_times, measured, communication, [schedule] * trace.stages))
        costs = [Costs(stage.forward_s, stage.backward_s, stage.weight_s) for stage in times]
        ideal = simulate(schedule, costs)
    except (ValueError, SpecError) as error:
        times = tuple(map(_times, measured, communication, [None] * trace.stages))
        return Gantt(replica, measured, communication, times, None, str(error))
    return Gantt(replica, measured, communication, times, ideal)


def _span(event: TraceEvent) -> Span:
    action = Action(_COMPUTING[event.kind], event.micro_batch, max(0, event.chunk))
    return Span(action, event.start_s, event.end_s)


def _schedule(trace: Trace) -> PipelineSchedule:
    chunks = 1 + max((e.chunk for e in trace.events), default=0)
    virtual = chunks if chunks > 1 else None
    return build(trace.schedule, trace.stages, trace.micro_batches, virtual)


def _times(
    row: Sequence[Span], communication: Sequence[TraceEvent], schedule: PipelineSchedule | None
) -> StageTimes:
    chunks = schedule.chunks if schedule else 1

    def mean(kind: ActionKind) -> float:
        durations = [s.end - s.start for s in row if s.action.kind is kind]
        return sum(durations) / len(durations) * chunks if durations else 0.0

    def total(kind: str) -> float:
        return sum(e.end_s - e.start_s for e in communication if e.kind == kind)

    return StageTimes(
        mean(ActionKind.FORWARD),
        mean(ActionKind.BACKWARD),
        mean(ActionKind.WEIGHT),
        sum(s.end - s.start for s in row),
        total("send"),
        total("recv"),
        total("reduce"),
    )


ChromeEvent = dict[str, object]

_THREADS = ("compute", "ideal", "recv", "send", "reduce")
"""Threads of a rank's process; events of one thread do not overlap."""


def chrome_trace(trace: Trace, replicas: Sequence[Gantt]) -> dict[str, object]:
    """
    Convert the step to Chrome's trace format: one process per rank, one thread per kind of work.

    Args:
        trace: the step.
        replicas: the ideal step of each replica becomes a thread of its stages.

    Returns:
        Content of the JSON file; times are microseconds from the first event.
    """
    events = [*_metadata_events(trace)]
    for event in trace.events:
        events.append(_complete_event(event, event.kind if event.kind in _THREADS else "compute"))
    for gantt in replicas:
        events += [_complete_event(event, "ideal") for event in _ideal_events(trace, gantt)]
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "step": trace.step,
            "schedule": trace.schedule,
            "stages": trace.stages,
            "micro_batches": trace.micro_batches,
        },
        "traceEvents": events,
    }


def _metadata_events(trace: Trace) -> Iterator[ChromeEvent]:
    positions = {event.rank: event for event in trace.events}
    is_sliced = any(event.tensor for event in trace.events)
    for rank, position in sorted(positions.items()):
        name = f"replica {position.replica}, stage {position.stage}"
        name += f", slice {position.tensor}" if is_sliced else ""
        yield _metadata("process_name", rank, 0, {"name": f"{name} (rank {rank})"})
        yield _metadata("process_sort_index", rank, 0, {"sort_index": rank})
        for thread, title in enumerate(_THREADS):
            yield _metadata("thread_name", rank, thread, {"name": title})
            yield _metadata("thread_sort_index", rank, thread, {"sort_index": thread})


def _metadata(name: str, rank: int, thread: int, args: dict[str, object]) -> ChromeEvent:
    return {"ph": "M", "name": name, "pid": rank, "tid": thread, "args": args}


def _complete_event(event: TraceEvent, thread: str) -> ChromeEvent:
    """Return a "complete" event of Chrome's format, which has a duration."""
    name = event.kind
    if event.micro_batch >= 0:
        name += f"{event.micro_batch}{chr(39) * event.chunk}"  # as in `Action.__str__`
    return {
        "ph": "X",
        "name": name,
        "cat": event.kind,
        "pid": event.rank,
        "tid": _THREADS.index(thread),
        "ts": event.start_s * 1e6,
        "dur": (event.end_s - event.start_s) * 1e6,
        "args": {"micro_batch": event.micro_batch, "chunk": event.chunk},
    }


def _ideal_events(trace: Trace, gantt: Gantt) -> Iterator[TraceEvent]:
    if gantt.ideal is None:
        return
    events = [event for event in trace.events if event.replica == gantt.replica]
    first = min(event.tensor for event in events)
    ranks = {event.stage: event.rank for event in events if event.tensor == first}
    began = min((span.start for row in gantt.measured for span in row), default=0.0)
    for stage, row in enumerate(gantt.ideal.spans):
        for span in row if stage in ranks else ():
            action = span.action.kind.value, span.action.chunk, span.action.micro_batch
            times = began + span.start, began + span.end
            yield TraceEvent(ranks[stage], gantt.replica, stage, first, *action, *times)
