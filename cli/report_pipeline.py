"""The part of a report that shows a pipeline: a real step beside the ideal one."""

from collections.abc import Iterator, Sequence
from html import escape

from distplat.cli.schedule_svg import STRIPS, Strip, svg
from distplat.platform.pipeline_trace import Trace
from distplat.platform.run_record import RunRecord
from distplat.strategies.algorithms.gantt import Gantt, Rows, StageTimes, gantts
from distplat.strategies.algorithms.simulate import Span

_WIDTH = 900
"""Of a chart's plot, in pixels: the page is 1000 wide."""


def pipeline(record: RunRecord) -> Iterator[str]:
    """Write the section, if the run has a pipeline."""
    chosen = record.job.get("strategy")
    trace = record.trace
    if trace is None:
        if isinstance(chosen, dict) and chosen.get("name") == "hybrid":
            yield "<h2>Pipeline</h2><p>No step is traced: there is no pipeline_trace.json.</p>"
        return
    yield "<h2>Pipeline</h2>"
    try:
        found = gantts(trace)
    except ValueError as error:
        yield f'<div class="note">pipeline_trace.json makes no sense: {escape(str(error))}</div>'
        return
    yield (
        f"<p>Step {trace.step}: {escape(trace.schedule)}, {trace.stages} stages, "
        f"{trace.micro_batches} micro-batches. The ideal pipeline is the same schedule with each "
        "stage's mean times and messages that take none; both charts have one scale.</p>"
    )
    yield bubbles(trace, found)
    if not found:
        return
    first, *others = found
    yield from _replica(first, len(found) > 1)
    if others:
        yield "<details><summary>the other replicas</summary>"
        for one in others:
            yield from _replica(one, several=True)
        yield "</details>"


def bubbles(trace: Trace, found: list[Gantt]) -> str:
    """Write the table of steps and bubbles, measured beside ideal."""
    p, m = trace.stages, trace.micro_batches
    rows = "".join(
        f'<tr><td>replica {one.replica}</td><td class="n">{one.step_s * 1e3:.1f} ms</td>'
        f'<td class="n">{one.pipeline_s * 1e3:.1f} ms</td>'
        f'<td class="n">{_ideal(one)}</td><td class="n">{one.bubble:.1%}</td>'
        f'<td class="n">{one.least_bubble:.1%}</td>'
        f'<td class="n">{_ideal_bubble(one)}</td></tr>'
        for one in found
    )
    textbook = ""
    if trace.schedule in ("1f1b", "gpipe"):
        textbook = (
            f'<p class="quiet">Textbook bubble of stages of equal cost, (p-1)/(m+p-1): '
            f"{(p - 1) / (m + p - 1):.1%}.</p>"
        )
    return (
        '<table><tr><th></th><th class="n">step, with exchange</th><th class="n">pipeline</th>'
        '<th class="n">ideal pipeline</th>'
        '<th class="n">bubble</th><th class="n">of the busiest stage</th>'
        f'<th class="n">ideal bubble</th></tr>{rows}</table>{textbook}'
    )


def _ideal(one: Gantt) -> str:
    return f"{one.ideal.makespan * 1e3:.1f} ms" if one.ideal else "unknown"


def _ideal_bubble(one: Gantt) -> str:
    return f"{one.ideal.bubble:.1%}" if one.ideal else "unknown"


def _replica(one: Gantt, several: bool) -> Iterator[str]:
    if several:
        yield f"<h3>Replica {one.replica}</h3>"
    longest = max(one.step_s, one.ideal.makespan if one.ideal else 0.0) * 1e3
    strips = [
        Strip(stage, event.kind, event.start_s * 1e3, event.end_s * 1e3)
        for stage, row in enumerate(one.others)
        for event in row
        if event.kind in STRIPS
    ]
    shown = f"{one.pipeline_s * 1e3:.1f} ms, bubble {one.bubble:.1%}"
    chart = _chart(one.measured, "measured", shown, longest, strips)
    yield f'<div class="wide">{chart}</div>'
    if one.ideal is None:
        yield f'<div class="note">no ideal step: {escape(one.why_not)}</div>'
    else:
        shown = f"{_ideal(one)}, bubble {_ideal_bubble(one)}"
        chart = _chart(one.ideal.spans, "ideal", shown, longest)
        yield f'<div class="wide">{chart}</div>'
    yield _stages(one.times)


def _stages(times: tuple[StageTimes, ...]) -> str:
    split = any(one.weight_s for one in times)
    heads = ["", "forward", "backward", *(["weights"] if split else [])]
    heads += ["computing", "receiving", "sending", "reducing"]
    head = "".join(f'<th class="n">{name}</th>' for name in heads)
    rows = ""
    for stage, one in enumerate(times):
        values = [one.forward_s, one.backward_s, *([one.weight_s] if split else [])]
        values += [one.busy_s, one.recv_s, one.send_s, one.reduce_s]
        cells = "".join(f'<td class="n">{value * 1e3:.2f} ms</td>' for value in values)
        rows += f"<tr><td>stage {stage}</td>{cells}</tr>"
    return (
        f"<table><tr>{head}</tr>{rows}</table>"
        '<p class="quiet">Forward and backward: mean of a micro-batch. The rest: sums over the '
        "step; receiving is mostly waiting for a neighbour.</p>"
    )


def _chart(rows: Rows, title: str, shown: str, longest: float, strips: Sequence[Strip] = ()) -> str:
    spans = _ms(rows)
    return svg(spans, title, shown, strips=strips, until=longest, unit=" ms", least=_WIDTH)


def _ms(rows: Rows) -> Rows:
    return tuple(tuple(Span(s.action, s.start * 1e3, s.end * 1e3) for s in row) for row in rows)
