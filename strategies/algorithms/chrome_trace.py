"""
A step of a pipeline in Chrome's trace event format, which Perfetto and chrome://tracing open.

The format is Google's "Trace Event Format", the JSON that perfetto.dev/docs lists as supported.
"""

from collections.abc import Iterator, Sequence

from distplat.platform.pipeline_trace import Trace, TraceEvent
from distplat.strategies.algorithms.gantt import Gantt
from distplat.strategies.algorithms.simulate import Span

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
    events = [*_names(trace), *map(_measured, trace.events)]
    for one in replicas:
        events += _ideal(trace, one)
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


def _measured(event: TraceEvent) -> ChromeEvent:
    thread = event.kind if event.kind in _THREADS else "compute"
    name = event.kind
    if event.micro_batch >= 0:
        name += f"{event.micro_batch}{chr(39) * event.chunk}"  # as `Action` is written
    where = {"micro_batch": event.micro_batch, "chunk": event.chunk}
    return _complete(name, event.kind, event.rank, thread, event.start_s, event.end_s, where)


def _ideal(trace: Trace, one: Gantt) -> Iterator[ChromeEvent]:
    if one.ideal is None:
        return
    here = [event for event in trace.events if event.replica == one.replica]
    first = min(event.tensor for event in here)
    ranks = {event.stage: event.rank for event in here if event.tensor == first}
    began = min((span.start for row in one.measured for span in row), default=0.0)
    for stage, row in enumerate(one.ideal.spans):
        for span in row if stage in ranks else ():
            yield _ideal_span(span, ranks[stage], began)


def _ideal_span(span: Span, rank: int, began: float) -> ChromeEvent:
    where = {"micro_batch": span.action.micro_batch, "chunk": span.action.chunk}
    kind, name = span.action.kind.value, str(span.action)
    return _complete(name, kind, rank, "ideal", began + span.start, began + span.end, where)


def _complete(
    name: str,
    kind: str,
    rank: int,
    thread: str,
    start_s: float,
    end_s: float,
    where: dict[str, int],
) -> ChromeEvent:
    """Give a complete event: one with a duration."""
    return {
        "ph": "X",
        "name": name,
        "cat": kind,
        "pid": rank,
        "tid": _THREADS.index(thread),
        "ts": start_s * 1e6,
        "dur": (end_s - start_s) * 1e6,
        "args": where,
    }
