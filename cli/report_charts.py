"""Charts of a report as SVG: curves over steps, stacked columns, bars. No script in them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from distplat.cli.schedule_svg import round_step

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Okabe & Ito's: told apart by colour-blind readers too."""
_GRID, _TEXT, _MARK = "#e8e8e8", "#555555", "#b00020"

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 1000, 64, 16, 12, 40
_PLOT = _WIDTH - _LEFT - _RIGHT
_LEAST_RATIO_FOR_LOG = 30.0


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y); a y that is not finite breaks the line."""
    colour: str = PALETTE[0]
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at an x."""

    x: float
    told: str


@dataclass(frozen=True)
class Stack:
    """One column."""

    start: float
    """Where it begins on the axis below."""
    stop: float
    told: str
    """What it is of, for who points at it."""
    values: Mapping[str, float]
    """Of each layer."""


def curves(
    series: Sequence[Series],
    x_title: str,
    *,
    marks: Sequence[Mark] = (),
    height: int = 260,
    from_zero: bool = False,
) -> str:
    """
    Draw curves.

    Args:
        series: all over one axis.
        x_title: of the axis below.
        marks: what happened meanwhile.
        height: of the drawing.
        from_zero: begin the axis at 0; else it is as the values are, logarithmic where they span
            decades.
    """
    axes = _Axes(series, marks, height, from_zero)
    parts = [*axes.grid(x_title), *axes.marks(marks)]
    for one in series:
        parts += axes.curve(one)
    several = len(series) > 1
    if several:
        parts += _legend([(s.name, s.colour, 0.3 if s.faint else 1.0) for s in series])
    return _svg(height, parts, legend=several)


def columns(
    names: Mapping[str, str],
    stacks: Sequence[Stack],
    most: float,
    x_title: str,
    unit: str,
    *,
    height: int = 240,
) -> str:
    """
    Draw stacks side by side.

    Args:
        names: of the layers, from below, with their colours.
        stacks: from left to right, without gaps.
        most: where the axis ends; higher stacks are cut, and say so.
        x_title: of the axis below.
        unit: of the values.
        height: of the drawing.
    """
    scale = _Scale(stacks[0].start, stacks[-1].stop, 0.0, most or 1.0, height)
    parts = [*_grid(scale, x_title)]
    for stack in stacks:
        parts += _stack(scale, names, stack, unit)
    return _svg(
        height,
        [*parts, *_legend([(name, colour, 1.0) for name, colour in names.items()])],
        legend=True,
    )


def bar(shares: Sequence[tuple[str, float, str, str]]) -> str:
    """
    Draw one bar of parts that make a whole.

    Args:
        shares: (name, part from 0 to 1, colour, what to tell).
    """
    x, parts = 0.0, []
    for name, share, colour, told in shares:
        width = share * _WIDTH
        parts.append(
            f'<g><title>{escape(told)}</title><rect x="{x:.1f}" y="0" width="{width:.1f}" '
            f'height="30" fill="{colour}"/>'
        )
        label = f"{name} {share:.0%}"
        if width > 7.5 * len(label):
            parts.append(
                f'<text x="{x + width / 2:.1f}" y="20" text-anchor="middle" fill="#ffffff">'
                f"{escape(label)}</text>"
            )
        parts.append("</g>")
        x += width
    return _svg(30, parts, legend=False)


class _Scale:
    """From values to pixels."""

    def __init__(
        self, left: float, right: float, low: float, high: float, height: int, *, log: bool = False
    ) -> None:
        self.left, self.right = left, right if right > left else left + 1
        self.low, self.high, self.log = low, high if high > low else low + 1, log
        self.bottom = height - _BOTTOM

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * _PLOT

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(one) for one in (value, low, high))
        part = min(max((value - low) / (high - low), 0.0), 1.0)
        return self.bottom - part * (self.bottom - _TOP)

    def levels(self) -> list[float]:
        """Give round values for lines across."""
        if not self.log:
            step = round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            return [n * step for n in range(first, int(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        some = (1, 2, 5) if len(decades) < 4 else (1,)
        every = [digit * 10.0**decade for decade in decades for digit in some]
        return [level for level in every if self.low <= level <= self.high]

    def places(self) -> list[float]:
        """Give round values for the axis below."""
        step = max(1.0, round_step((self.right - self.left) / 10))
        first = math.ceil(self.left / step - 1e-9)
        return [n * step for n in range(first, int(self.right / step + 1e-9) + 1)]


class _Axes:
    """Where curves lie."""

    def __init__(
        self, series: Sequence[Series], marks: Sequence[Mark], height: int, from_zero: bool
    ) -> None:
        points = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
        xs = [0.0, *(x for x, _ in points), *(mark.x for mark in marks)]
        ys = [y for _, y in points] or [0.0, 1.0]
        low, high = min(ys), max(ys)
        log = not from_zero and low > 0 and high / low > _LEAST_RATIO_FOR_LOG
        room = 0.0 if log else 0.05 * (high - low)
        if not log:
            low = 0.0 if from_zero or 0 <= low < 0.3 * high else low - room
        self._scale = _Scale(min(xs), max(xs), low, high + room, height, log=log)

    def grid(self, x_title: str) -> Iterator[str]:
        yield from _grid(self._scale, x_title)

    def marks(self, marks: Sequence[Mark]) -> Iterator[str]:
        for mark in marks:
            x = self._scale.x(mark.x)
            yield (
                f"<g><title>{escape(mark.told)}</title>"
                f'<path d="M{x:.1f} {_TOP}V{self._scale.bottom}" stroke="{_MARK}" '
                f'stroke-dasharray="4 3"/><path d="M{x - 5:.1f} {_TOP}h10l-5 8z" fill="{_MARK}"/>'
                "</g>"
            )

    def curve(self, series: Series) -> Iterator[str]:
        path, pen = [], "M"
        for x, y in series.points:
            if math.isfinite(y):
                path.append(f"{pen}{self._scale.x(x):.1f} {self._scale.y(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        faded = ' stroke-opacity="0.3"' if series.faint else ""
        yield (
            f'<path d="{"".join(path)}" fill="none" stroke="{series.colour}" '
            f'stroke-width="{1 if series.faint else 2}" stroke-linejoin="round"{faded}/>'
        )
        for x, y in series.points if series.dots else ():
            if math.isfinite(y):
                yield (
                    f"<g><title>{escape(series.name)} {y:.4g} at {x:g}</title>"
                    f'<circle cx="{self._scale.x(x):.1f}" cy="{self._scale.y(y):.1f}" r="3.5" '
                    f'fill="{series.colour}"/></g>'
                )


def _grid(scale: _Scale, x_title: str) -> Iterator[str]:
    right = _WIDTH - _RIGHT
    for level in scale.levels():
        y = scale.y(level)
        yield f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="{_GRID}"/>'
        yield _text(_LEFT - 8, y + 4, f"{level:.4g}", "end")
    for place in scale.places():
        x = scale.x(place)
        yield f'<path d="M{x:.1f} {scale.bottom}v4" stroke="#999999"/>'
        yield _text(x, scale.bottom + 17, f"{place:g}", "middle")
    yield f'<path d="M{_LEFT} {scale.bottom}H{right}" stroke="#999999"/>'
    yield _text(right, scale.bottom + 32, x_title, "end")


def _stack(scale: _Scale, names: Mapping[str, str], stack: Stack, unit: str) -> Iterator[str]:
    left, right = scale.x(stack.start), scale.x(stack.stop)
    gap = 0.5 if right - left > 4 else 0.0
    values = stack.values
    whole = sum(v for v in values.values() if math.isfinite(v))
    told = f"{stack.told}: {whole:.3g} {unit}"
    if len(values) > 1:
        told += f" ({', '.join(f'{name} {value:.3g}' for name, value in values.items())})"
    yield f"<g><title>{escape(told)}</title>"
    level = 0.0
    for name, colour in names.items():
        value = values.get(name, 0.0)
        if math.isfinite(value) and value > 0:
            top, foot = scale.y(level + value), scale.y(level)
            level += value
            yield (
                f'<rect x="{left:.2f}" y="{top:.2f}" width="{right - left - gap:.2f}" '
                f'height="{foot - top:.2f}" fill="{colour}"/>'
            )
    if level > scale.high * (1 + 1e-9):
        yield _text(left, _TOP - 2, f"▲ {level:.3g}", "start")
    yield "</g>"


def _legend(names: Sequence[tuple[str, str, float]]) -> Iterator[str]:
    """Draw names, colours and opacities above the plot."""
    x = float(_LEFT)
    for name, colour, opacity in names:
        faded = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        yield f'<rect x="{x:.0f}" y="-18" width="12" height="12" rx="2" fill="{colour}"{faded}/>'
        yield _text(x + 17, -8, name, "start")
        x += 34 + 7.0 * len(name)


def _svg(height: int, parts: Sequence[str], legend: bool) -> str:
    top = -24 if legend else 0
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {_WIDTH} {height - top}" '
        f'width="{_WIDTH}" height="{height - top}" font-size="12">' + "".join(parts) + "</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_TEXT}">{escape(text)}</text>'
    )
