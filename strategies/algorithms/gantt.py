"""
A measured step of a pipeline beside the ideal one.

    measured   F0 F1 .. B0-- F2 . B1--      from `pipeline_trace.json`
    ideal      F0 F1 . B0-- F2 B1--         the same schedule, simulated with each stage's mean
                                            times and messages that take none

What the ideal step is shorter by is what messages, waits and uneven micro-batches cost.
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
    """What one stage of one replica did in the step; seconds."""

    forward_s: float
    """Mean of a micro-batch, over all its chunks of layers together."""
    backward_s: float
    weight_s: float
    """Mean of a micro-batch, where the schedule splits backward, else 0."""
    busy_s: float
    send_s: float
    recv_s: float
    reduce_s: float


@dataclass(frozen=True)
class Gantt:
    """One replica's step."""

    replica: int
    measured: BarRows
    """Of each stage, what it computed; of slices of a stage, the first one's."""
    communication: tuple[tuple[TraceEvent, ...], ...]
    """Of each stage, sends, receives, packing and the reduction."""
    times: tuple[StageTimes, ...]
    ideal: Simulation | None
    """None: the schedule cannot be simulated; `why_not` says why."""
    why_not: str = ""

    @property
    def bubble(self) -> float:
        """Measured part of the stages' time, 0 to 1, in which they did not compute."""
        return bubble(self.measured)

    @property
    def least_bubble(self) -> float:
        """The same of the busiest stage alone: stages of unequal cost do not count."""
        busiest = max((one.busy_s for one in self.times), default=0.0)
        return 1 - busiest / self.pipeline_s if self.pipeline_s else 0.0

    @property
    def pipeline_s(self) -> float:
        """From the first start to the last end of what stages computed."""
        return makespan(self.measured)

    @property
    def step_s(self) -> float:
        """The same with messages and the reduction."""
        times = [(s.start, s.end) for row in self.measured for s in row]
        times += [(e.start_s, e.end_s) for row in self.communication for e in row]
        if not times:
            return 0.0
        return max(end for _, end in times) - min(start for start, _ in times)


def gantts(trace: Trace) -> list[Gantt]:
    """
    Give the step of each replica.

    Raises:
        ValueError: the trace does not hold together: a stage that it does not have, for one.
    """
    wrong = [e for e in trace.events if not 0 <= e.stage < trace.stages]
    if wrong:
        raise ValueError(f"an event of stage {wrong[0].stage}, and there are {trace.stages}")
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
        costs = [Costs(one.forward_s, one.backward_s, one.weight_s) for one in times]
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
        took = [s.end - s.start for s in row if s.action.kind is kind]
        return sum(took) / len(took) * chunks if took else 0.0

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
"""Of a rank's process; events of one thread do not overlap."""


def chrome_trace(trace: Trace, replicas: Sequence[Gantt]) -> dict[str, object]:
    """
    Give the step as one process per rank, with a thread for each kind of work.

    Args:
        trace: the step.
        replicas: of its replicas; the ideal step of each becomes a thread of its stages.

    Returns:
        What the JSON file holds; times are microseconds from the first event.
    """
    events = [*_names(trace)]
    for event in trace.events:
        events.append(_drawn(event, event.kind if event.kind in _THREADS else "compute"))
    for one in replicas:
        events += [_drawn(event, "ideal") for event in _ideal(trace, one)]
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


def _names(trace: Trace) -> Iterator[ChromeEvent]:
    places = {event.rank: event for event in trace.events}
    sliced = any(event.tensor for event in trace.events)
    for rank, at in sorted(places.items()):
        name = f"replica {at.replica}, stage {at.stage}"
        name += f", slice {at.tensor}" if sliced else ""
        yield _metadata("process_name", rank, 0, {"name": f"{name} (rank {rank})"})
        yield _metadata("process_sort_index", rank, 0, {"sort_index": rank})
        for thread, title in enumerate(_THREADS):
            yield _metadata("thread_name", rank, thread, {"name": title})
            yield _metadata("thread_sort_index", rank, thread, {"sort_index": thread})


def _metadata(name: str, rank: int, thread: int, args: dict[str, object]) -> ChromeEvent:
    return {"ph": "M", "name": name, "pid": rank, "tid": thread, "args": args}


def _drawn(event: TraceEvent, thread: str) -> ChromeEvent:
    """Give a complete event: one with a duration."""
    name = event.kind
    if event.micro_batch >= 0:
        name += f"{event.micro_batch}{chr(39) * event.chunk}"  # as `Action` is written
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


def _ideal(trace: Trace, one: Gantt) -> Iterator[TraceEvent]:
    if one.ideal is None:
        return
    here = [event for event in trace.events if event.replica == one.replica]
    first = min(event.tensor for event in here)
    ranks = {event.stage: event.rank for event in here if event.tensor == first}
    began = min((span.start for row in one.measured for span in row), default=0.0)
    for stage, row in enumerate(one.ideal.spans):
        for span in row if stage in ranks else ():
            what = span.action.kind.value, span.action.chunk, span.action.micro_batch
            times = began + span.start, began + span.end
            yield TraceEvent(ranks[stage], one.replica, stage, first, *what, *times)
