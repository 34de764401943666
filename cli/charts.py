"""
Charts: SVG drawings with matplotlib (curves, stacked columns, pipelines), and pipelines as text.

Names from a run are not drawn by matplotlib, which would parse `$` as math and warn about glyphs
missing in its font. They are shown in `Chart.legend` and in tooltips, which are escaped here.

The text chart of a pipeline has one row per stage, with time from left to right. The spans may be
simulated or measured:

    stage 0  F0 F1 ......B0--- ...B1---
    stage 1  ...F0 B0--- F1 B1--- ......
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter
from rich.text import Text

from distplat.strategies.algorithms.pipeline_schedule import ActionKind
from distplat.strategies.algorithms.simulate import Span, makespan

Spans = Sequence[Sequence[Span]]
"""Spans of each stage, in order of time."""

STYLES = {
    ActionKind.FORWARD: "white on blue",
    ActionKind.BACKWARD: "black on yellow",
    ActionKind.WEIGHT: "black on green",
}
_IDLE = "."
_MAX_COLUMNS = 2000
"""Maximum number of columns of a chart that is not printed to a terminal."""


def chart(spans: Spans, width: int | None = None) -> list[Text]:
    """
    Draw spans, one line per stage.

    Args:
        spans: spans of each stage.
        width: columns of the terminal; None: as many as the labels need.
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
    """Return the columns per unit of time at which every label fits, with a gap after it."""
    spans_drawn = [span for row in spans for span in row if span.end > span.start]
    return max(((len(str(s.action)) + 1) / (s.end - s.start) for s in spans_drawn), default=1.0)


def _cells(
    row: Sequence[Span], zero: float, scale: float, columns: int
) -> Iterator[tuple[str, ActionKind | None]]:
    at = 0
    for span in row:
        start = max(round((span.start - zero) * scale), at)
        stop = round((span.end - zero) * scale)
        if stop <= start:
            continue  # too short for a column at this scale
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


PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""The palette of Okabe & Ito, which colour-blind readers can distinguish."""
KINDS = {
    "F": ("forward", "#0072b2"),
    "B": ("backward", "#e69f00"),
    "W": ("gradient of weights", "#009e73"),
    "recv": ("recv (below)", "#cc79a7"),
    "send": ("send (below)", "#56b4e9"),
    "reduce": ("reduce (below)", "#d55e00"),
}
"""Name and colour of each kind of event of a stage."""
_MARK, _INK, _GRID = "#d01030", "#1a1a1a", "#e6e6e6"
THEMED = {_INK: "ink", _GRID: "grid"}
"""Colours replaced by CSS variables on a page, for its dark colour scheme."""

_WIDTH, _ROW, _DIGIT = 1000, 36, 6.6
"""Width of a chart, height of a stage's row, width of a digit, in matplotlib's points."""
MAX_VALUE = 1e150
"""Largest value drawn: with larger values matplotlib's axis arithmetic overflows."""
_MIN_RATIO_FOR_LOG = 30.0
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "distplat",  # the same ids for the same content
    "font.size": 12,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
}


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y); a y that is not finite, or beyond `MAX_VALUE`, breaks the line."""
    colour: str = PALETTE[0]
    faint: bool = False
    dots: bool = False


class Marker(NamedTuple):
    """An event at an x."""

    x: float
    text: str


class Stack(NamedTuple):
    """One column, from `start` to `stop` on the axis below."""

    start: float
    stop: float
    text: str
    """Title of its tooltip."""
    values: Mapping[str, float]
    """Value of each layer."""


class Bar(NamedTuple):
    """An event of a pipeline stage."""

    stage: int
    kind: str
    """One of `KINDS`."""
    chunk: int
    text: str
    """Label in the notation of actions: `F3'`."""
    start: float
    end: float


class Chart(NamedTuple):
    """A drawing for a page, and the legend of its colours."""

    svg: str
    legend: Sequence[tuple[str, str]] = ()
    """(name, colour); the names come from the run and are not escaped."""


class _Tooltips(list[str]):
    """Tooltips of a drawing: matplotlib sets element ids, which are replaced by SVG titles."""

    def add(self, text: str) -> str:
        """Add a tooltip and return the id for its element."""
        self.append(escape(text))
        return f"tip-{len(self) - 1}"

    def insert_titles(self, svg: str) -> str:
        """Insert the titles, and remove all other group ids: several drawings share a page."""
        titled = re.sub(
            r'<g id="tip-(\d+)">', lambda m: f"<g><title>{self[int(m[1])]}</title>", svg
        )
        return re.sub(r'<g id="[^"]*"', "<g", titled)


def curves(
    series: Sequence[Series],
    markers: Sequence[Marker] = (),
    *,
    height: int = 280,
    from_zero: bool = False,
) -> Chart:
    """
    Draw curves over steps.

    Args:
        series: curves, which share both axes.
        markers: events, drawn as vertical lines.
        height: height of the drawing.
        from_zero: start the y axis at 0; otherwise it spans the values, and is logarithmic if they
            span decades.
    """
    tips = _Tooltips()
    with matplotlib.style.context(["default", _STYLE]):
        figure, axes = _figure(height, "steps")
        _set_limits(axes, series, markers, from_zero)
        for marker in markers:
            line = axes.axvline(marker.x, color=_MARK, linestyle="--", gid=tips.add(marker.text))
            line.set(marker="v", markersize=9, markevery=[1], clip_on=False)  # at its upper end
        for curve in series:
            xs = [x for x, _ in curve.points]
            ys = [y if _is_drawable(y) else math.nan for _, y in curve.points]
            width, alpha = (1.0, 0.3) if curve.faint else (2.0, 1.0)
            axes.plot(xs, ys, color=curve.colour, linewidth=width, alpha=alpha)
            for x, y in curve.points if curve.dots else ():
                if _is_drawable(y):
                    tip = tips.add(f"{curve.name} {y:.4g} at {x:g}")
                    axes.plot([x], [y], "o", color=curve.colour, clip_on=False, gid=tip)
        svg = _svg(figure, tips, themed=True)
    legend = [
        (curve.name, f"{curve.colour}4d" if curve.faint else curve.colour) for curve in series
    ]
    return Chart(svg, legend if len(series) > 1 else ())


def _set_limits(
    axes: Axes, series: Sequence[Series], markers: Sequence[Marker], from_zero: bool
) -> None:
    points = [(x, y) for curve in series for x, y in curve.points if _is_drawable(y)]
    axes.set_xlim(0.0, max([0.0, *(x for x, _ in points), *(m.x for m in markers)]) or 1.0)
    ys = [y for _, y in points] or [0.0, 1.0]
    low, high = min(ys), max(ys)
    if not from_zero and low > 0 and high / low > _MIN_RATIO_FOR_LOG:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,)))
        axes.minorticks_off()
    else:
        margin = 0.05 * (high - low)
        low = 0.0 if from_zero or 0 <= low < 0.3 * high else low - margin
        high += margin
    axes.set_ylim(low, high if high > low else low + 1)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))


def columns(
    colours: Mapping[str, str], stacks: Sequence[Stack], max_value: float, x_title: str, unit: str
) -> Chart:
    """
    Draw stacked columns side by side.

    Args:
        colours: colour of each layer, from bottom to top.
        stacks: columns from left to right, without gaps.
        max_value: end of the y axis; higher columns are cut, and their value is written above them.
        x_title: title of the x axis.
        unit: unit of the values.
    """
    tips, levels = _Tooltips(), [0.0] * len(stacks)
    lefts, widths = [s.start for s in stacks], [0.92 * (s.stop - s.start) for s in stacks]
    with matplotlib.style.context(["default", _STYLE]):
        figure, axes = _figure(260, x_title)
        max_value = min(max_value, MAX_VALUE) or 1.0
        axes.set(xlim=(stacks[0].start, stacks[-1].stop), ylim=(0.0, max_value))
        for name, colour in colours.items():
            values = [_or_zero(stack.values.get(name, 0.0)) for stack in stacks]
            bars = axes.bar(lefts, values, widths, levels, align="edge", color=colour)
            for bar, stack in zip(bars, stacks, strict=True):
                bar.set_gid(tips.add(_stack_text(stack, unit)))
            levels = [level + value for level, value in zip(levels, values, strict=True)]
        for stack, level in zip(stacks, levels, strict=True):
            if level > max_value * (1 + 1e-9):
                axes.text(stack.start, max_value, f"▲ {level:.3g}", va="bottom")
        return Chart(_svg(figure, tips, themed=True), [*colours.items()])


def _stack_text(stack: Stack, unit: str) -> str:
    text = f"{stack.text}: {sum(map(_or_zero, stack.values.values())):.3g} {unit}"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in stack.values.items())
    return f"{text} ({parts})" if len(stack.values) > 1 else text


def _is_drawable(value: float) -> bool:
    return abs(value) <= MAX_VALUE  # False for NaN


def _or_zero(value: float) -> float:
    return value if _is_drawable(value) else 0.0


def bars_of(spans: Spans, scale: float = 1.0) -> list[Bar]:
    """Convert the computation spans of stages to bars; times are multiplied by `scale`."""
    return [
        Bar(
            stage,
            span.action.kind,
            span.action.chunk,
            f"{span.action}",
            span.start * scale,
            span.end * scale,
        )
        for stage, row in enumerate(spans)
        for span in row
    ]


def pipeline_chart(
    timelines: Mapping[str, Sequence[Bar]], unit: str = "", *, themed: bool = True
) -> str:
    """
    Draw pipeline steps below each other, on one time scale; each starts with its first bar.

    Args:
        timelines: bars of each step, by title.
        unit: unit of the times.
        themed: use the colours of the page; otherwise the drawing is a separate file, on white.
    """
    all_bars = [bar for bars in timelines.values() for bar in bars]
    stages = 1 + max((bar.stage for bar in all_bars), default=0)
    zeros = [min((bar.start for bar in bars), default=0.0) for bars in timelines.values()]
    ends = [max((bar.end for bar in bars), default=0.0) for bars in timelines.values()]
    duration = max(end - zero for zero, end in zip(zeros, ends, strict=True)) or 1.0
    width, height = float(_WIDTH), len(timelines) * (stages * _ROW + 76) + 40
    if not themed:  # wide enough for all labels, within reason
        scales = [
            _label_width(bar) / (bar.end - bar.start) for bar in all_bars if bar.end > bar.start
        ]
        width = min(max(_WIDTH, 100 + duration * max(scales, default=0.0)), 4 * _WIDTH)
    tips = _Tooltips()
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure((width / 72, height / 72), layout="constrained")
        rows = figure.subplots(len(timelines), 1, squeeze=False)[:, 0]
        for axes, (title, bars), zero in zip(rows, timelines.items(), zeros, strict=True):
            axes.set(xlim=(0.0, duration), ylim=(stages - 0.5, -0.5))
            axes.set_title(title, loc="left")
            axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}" + unit))
            axes.barh(range(stages), duration, height=0.84, color=_GRID)
            _draw_bars(axes, bars, zero, unit, tips, duration / (width - 100))
        kinds = {bar.kind for bar in all_bars}
        handles = [Patch(color=c, label=name) for kind, (name, c) in KINDS.items() if kind in kinds]
        handles.append(Patch(color=_GRID, label="idle"))
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)
        chunks = any(bar.chunk > 0 for bar in all_bars)
        note = "numbers: micro-batches" + (", primes and paler: later chunks" if chunks else "")
        rows[-1].set_xlabel(note, loc="left")
        return _svg(figure, tips, themed)


def _draw_bars(
    axes: Axes, bars: Sequence[Bar], zero: float, unit: str, tips: _Tooltips, pixel: float
) -> None:
    """Draw the events of stages: computation in the rows, communication as strips below."""
    for bar in bars:
        length, later = bar.end - bar.start, max(bar.chunk, 0) % 3
        below = len(bar.kind) > 1
        colour = _lighten(KINDS[bar.kind][1], 0.65**later)
        inset = 0.0 if below else min(pixel / 2, length / 4)
        (rectangle,) = axes.barh(
            bar.stage + (0.47 if below else 0.0),
            max(length - 2 * inset, pixel / 2),
            left=bar.start - zero + inset,
            height=0.1 if below else 0.84,
            color=colour,
        )
        rectangle.set_gid(tips.add(f"{bar.text}: {bar.start:g} to {bar.end:g}{unit}"))
        if not below and length >= _label_width(bar) * pixel * (1 - 1e-9):
            ink = "#000000" if later or bar.kind == "B" else "#ffffff"
            middle = (bar.start + bar.end) / 2 - zero
            label = axes.text(middle, bar.stage, bar.text[1:], color=ink)
            label.set(ha="center", va="center_baseline")


def _label_width(bar: Bar) -> float:
    return (len(bar.text) - 1) * _DIGIT


def _lighten(colour: str, part: float) -> str:
    red, green, blue = (part * c + (1 - part) for c in to_rgb(colour))
    return to_hex((red, green, blue))


def _figure(height: int, x_title: str) -> tuple[Figure, Axes]:
    figure = Figure((_WIDTH / 72, height / 72), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y")
    axes.set_xlabel(x_title, loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure, axes


def _svg(figure: Figure, tips: _Tooltips, themed: bool) -> str:
    file, nothing = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=themed, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in THEMED.items() if themed else ():
        svg = svg.replace(colour, f"var(--{name})")
    return tips.insert_titles(svg)
