"""A pipeline's chart as SVG: rows of stages, a time axis, a legend."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from distplat.cli.schedule_chart import Spans
from distplat.strategies.algorithms.schedule import Kind
from distplat.strategies.algorithms.simulate import Span

_COLOURS = {Kind.FORWARD: "#0072b2", Kind.BACKWARD: "#e69f00", Kind.WEIGHT: "#009e73"}
"""Okabe & Ito's palette: told apart by colour-blind readers too."""
_INK = {Kind.FORWARD: "#ffffff", Kind.BACKWARD: "#000000", Kind.WEIGHT: "#ffffff"}
_NAMES = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.WEIGHT: "gradient of weights"}
_IDLE = "#f0f0f0"
STRIPS = {"recv": "#cc79a7", "send": "#56b4e9", "reduce": "#d55e00"}

_LEFT, _TOP, _RIGHT = 72, 64, 24
_ROW, _GAP = 30, 6
_AXIS, _LEGEND = 34, 40
_LETTER = 6.6
"""Width of a digit in pixels, at the size of the labels."""
_LEAST, _MOST = 640, 4000
"""Pixels of the plot's width."""


@dataclass(frozen=True)
class Strip:
    """What a stage did besides computing: a strip below its row."""

    stage: int
    kind: str
    """`send`, `recv`, `reduce`."""
    start: float
    end: float


def svg(
    spans: Spans,
    title: str,
    subtitle: str,
    *,
    strips: Sequence[Strip] = (),
    until: float | None = None,
    unit: str = "",
    least: float = _LEAST,
) -> str:
    """
    Draw spans.

    Args:
        spans: of each stage, simulated or measured.
        title: the first line.
        subtitle: the figures.
        strips: what else the stages did.
        until: time at the right edge, so that several charts have one scale; None: where it ends.
        unit: of the times.
        least: width of the plot, in pixels, where the labels would need no more.
    """
    plot = _Plot(spans, strips, until, unit, least)
    height = _TOP + len(spans) * (_ROW + _GAP) + _AXIS + _LEGEND
    width = _LEFT + plot.width + _RIGHT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="12">'
    )
    parts = [
        head,
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="24" font-size="16" font-weight="bold">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="44" fill="#555555">{escape(subtitle)}</text>',
        *plot.rows(),
        *plot.axis(),
        *plot.legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Plot:
    """Where times and stages lie on the page."""

    def __init__(
        self,
        spans: Spans,
        strips: Sequence[Strip],
        until: float | None,
        unit: str,
        least: float,
    ) -> None:
        self._spans, self._strips, self._unit = spans, strips, unit
        every = [span for row in spans for span in row]
        times = [(s.start, s.end) for s in every] + [(s.start, s.end) for s in strips]
        self._zero = min((start for start, _ in times), default=0.0)
        ends = max((end for _, end in times), default=0.0)
        self._whole = (until or ends - self._zero) or 1.0
        lengths = [(_label_width(s), s.end - s.start) for s in every if s.end > s.start]
        wanted = max((pixels / length for pixels, length in lengths), default=1.0)
        self.width = min(max(wanted * self._whole, least), _MOST)
        self._scale = self.width / self._whole
        self._bottom = _TOP + len(spans) * (_ROW + _GAP)

    def _x(self, time: float) -> float:
        return _LEFT + (time - self._zero) * self._scale

    def rows(self) -> Iterator[str]:
        for stage, row in enumerate(self._spans):
            top = _TOP + stage * (_ROW + _GAP)
            yield (
                f'<text x="{_LEFT - 10}" y="{top + _ROW / 2 + 4:g}" text-anchor="end">'
                f"stage {stage}</text>"
            )
            yield _rect(_LEFT, top, self.width, _IDLE)
            for span in row:
                yield from self._span(span, top)
            for strip in self._strips:
                if strip.stage == stage:
                    yield from self._strip(strip, top)

    def _strip(self, strip: Strip, top: float) -> Iterator[str]:
        length = (strip.end - strip.start) * self._scale
        told = f"{strip.kind}: {strip.start:g} to {strip.end:g}{self._unit}"
        colour = STRIPS[strip.kind]
        yield (
            f'<g><title>{told}</title><rect x="{self._x(strip.start):.2f}" y="{top + _ROW:g}" '
            f'width="{max(length, 0.5):.2f}" height="{_GAP - 1}" fill="{colour}"/></g>'
        )

    def _span(self, span: Span, top: float) -> Iterator[str]:
        kind, length = span.action.kind, (span.end - span.start) * self._scale
        fade = 0.65 ** (span.action.chunk % 3)
        told = f"{span.action}: {span.start:g} to {span.end:g}{self._unit}"
        yield f"<g><title>{told}</title>"
        inset = min(0.5, length / 4)
        x = self._x(span.start) + inset
        # An opaque ground below, so that a faded chunk does not show the idle colour.
        yield _rect(x, top, length - 2 * inset, "#ffffff")
        yield _rect(x, top, length - 2 * inset, _COLOURS[kind], fade)
        if length >= _label_width(span):
            ink = _INK[kind] if fade == 1 else "#000000"
            label = str(span.action)[1:]
            yield (
                f'<text x="{self._x(span.start) + length / 2:.2f}" y="{top + _ROW / 2 + 4:g}" '
                f'text-anchor="middle" fill="{ink}">{label}</text>'
            )
        yield "</g>"

    def axis(self) -> Iterator[str]:
        y = self._bottom + 4
        step = round_step(self._whole * 60 / self.width)
        for number in range(int(self._whole / step + 1e-9) + 1):
            x = _LEFT + number * step * self._scale
            yield (
                f'<path d="M{x:.2f} {y}v5" stroke="#999999"/>'
                f'<text x="{x:.2f}" y="{y + 18}" text-anchor="middle" fill="#555555">'
                f"{number * step:g}{self._unit}</text>"
            )

    def legend(self) -> Iterator[str]:
        kinds = {span.action.kind for row in self._spans for span in row}
        chunks = max((span.action.chunk for row in self._spans for span in row), default=0)
        shown = [(_NAMES[kind], _COLOURS[kind]) for kind in Kind if kind in kinds]
        strips = {strip.kind for strip in self._strips}
        below = [(f"{kind} (below)", STRIPS[kind]) for kind in STRIPS if kind in strips]
        x, y = float(_LEFT), self._bottom + _AXIS + 8
        for name, colour in [*shown, ("idle", _IDLE), *below]:
            yield f'<rect x="{x:g}" y="{y}" width="14" height="14" rx="2" fill="{colour}"/>'
            yield f'<text x="{x + 20:g}" y="{y + 11}">{name}</text>'
            x += 44 + len(name) * _LETTER
        note = "numbers: micro-batches" + (", primes and paler: later chunks" if chunks else "")
        yield f'<text x="{x:g}" y="{y + 11}" fill="#555555">{note}</text>'


def _label_width(span: Span) -> float:
    return (len(str(span.action)) - 1) * _LETTER + 6


def _rect(x: float, y: float, width: float, colour: str, opacity: float = 1.0) -> str:
    faded = f' fill-opacity="{opacity:.3g}"' if opacity < 1 else ""
    return (
        f'<rect x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{_ROW}" rx="2" '
        f'fill="{colour}"{faded}/>'
    )


def round_step(least: float) -> float:
    """Give the smallest of 1, 2, 5, 10, 20, ... (or 0.5, 0.2, ...) that is >= `least`."""
    power = 1.0
    while power >= least:
        power /= 10
    while power * 10 < least:
        power *= 10
    return next(power * step for step in (1, 2, 5, 10) if power * step >= least * (1 - 1e-9))
