"""
A pipeline's chart for a terminal: a row per stage, time from left to right.

    stage 0  F0 F1 ......B0--- ...B1---
    stage 1  ...F0 B0--- F1 B1--- ......

It draws spans, and does not ask whether they were simulated or measured.
"""

from collections.abc import Iterator, Sequence

from rich.text import Text

from distplat.strategies.algorithms.schedule import ActionKind
from distplat.strategies.algorithms.simulate import Span, makespan

Spans = Sequence[Sequence[Span]]
"""Of each stage, in order of time."""

STYLES = {
    ActionKind.FORWARD: "white on blue",
    ActionKind.BACKWARD: "black on yellow",
    ActionKind.WEIGHT: "black on green",
}
_IDLE = "."
_MAX_COLUMNS = 2000
"""Of a chart that goes to a file, where no terminal sets a limit."""


def chart(spans: Spans, width: int | None = None) -> list[Text]:
    """
    Draw spans, one line per stage.

    Args:
        spans: what to draw.
        width: columns that there are; None: as many as the labels need.
    """
    names = [f"stage {stage}" for stage in range(len(spans))]
    margin = max(map(len, names), default=0) + 2
    room = (width or _MAX_COLUMNS) - margin
    scale = min(_natural_scale(spans), max(room, 1) / (makespan(spans) or 1))
    zero = min((span.start for row in spans for span in row), default=0.0)
    columns = round(makespan(spans) * scale)
    lines = []
    for name, row in zip(names, spans, strict=True):
        line = Text(name.ljust(margin), no_wrap=True)
        for text, kind in _cells(row, zero, scale, columns):
            line.append(text, STYLES[kind] if kind else "dim")
        lines.append(line)
    return lines


def _natural_scale(spans: Spans) -> float:
    """Columns per unit of time at which every label has room, and a gap behind it."""
    every = [span for row in spans for span in row if span.end > span.start]
    return max(((len(str(s.action)) + 1) / (s.end - s.start) for s in every), default=1.0)


def _cells(
    row: Sequence[Span], zero: float, scale: float, columns: int
) -> Iterator[tuple[str, ActionKind | None]]:
    at = 0
    for span in row:
        start = max(round((span.start - zero) * scale), at)
        stop = round((span.end - zero) * scale)
        if stop <= start:
            continue  # too short to be seen at this scale
        yield _IDLE * (start - at), None
        yield _label(span, stop - start), span.action.kind
        at = stop
    yield _IDLE * (columns - at), None


def _label(span: Span, columns: int) -> str:
    label = str(span.action)
    if len(label) > columns:
        return span.action.kind.value.ljust(columns, "-")
    if len(label) == columns:
        return label
    return label.ljust(columns - 1, "-") + " "
