"""
A run as one HTML page: everything is in it, nothing is fetched, no script runs.

All text of the run (names, paths, errors) goes through `escape`: a job may be called `<script>`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from distplat.cli.figures import figure_rows as figure_lines
from distplat.cli.figures import mean_figures
from distplat.cli.report_charts import PALETTE, Mark, Series, Stack, bar, columns, curves
from distplat.cli.report_pipeline import pipeline
from distplat.cli.report_words import checkpoint_lines, facts, number, restart_lines
from distplat.platform.progress import StepSummary
from distplat.platform.report import (
    Restart,
    Status,
    binned,
    figure_rows,
    metrics,
    restarts,
    smoothed,
    staleness,
    status_of,
    time_parts,
    usual_most,
)
from distplat.platform.run_record import RunRecord

_COLUMNS = 160
"""Of a chart: more could not be told apart."""
_ROWS = 12
"""Of a table that is shown at once."""
_PARTS = {"data": "#56b4e9", "compute": "#0072b2", "exchange": "#d55e00", "update": "#009e73"}
_STATUS = {"SUCCEEDED": "good", "RUNNING": "busy"}

_STYLE = """
body { font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; color: #1a1a1a; margin: 0 auto;
       max-width: 1000px; padding: 24px 32px 64px; background: #fff; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 8px; border-bottom: 1px solid #ddd; padding-bottom: 4px; }
h3 { font-size: 15px; margin: 22px 0 2px; }
p { margin: 6px 0; max-width: 760px; } .quiet { color: #5a5a5a; }
svg { display: block; max-width: 100%; height: auto; margin: 8px 0;
      font-family: system-ui, Helvetica, Arial, sans-serif; }
.wide { overflow-x: auto; } .wide svg { max-width: none; }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 18px 4px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; color: #5a5a5a; } tr + tr td { border-top: 1px solid #eee; }
td.n, th.n { text-align: right; white-space: nowrap; }
.badge { display: inline-block; padding: 1px 10px; border-radius: 10px; font-size: 13px;
         font-weight: 600; color: #fff; background: #b00020; vertical-align: 3px; }
.badge.good { background: #00705a; } .badge.busy { background: #0072b2; }
.note { background: #fff6dc; border-left: 4px solid #e69f00; padding: 6px 12px; margin: 10px 0; }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px 24px; margin: 18px 0; }
.facts div { min-width: 0; overflow-wrap: anywhere; font-size: 17px; }
.facts span { display: block; color: #5a5a5a; font-size: 13px; }
pre { background: #f6f6f6; padding: 12px; overflow-x: auto; font-size: 13px; }
summary { cursor: pointer; color: #0072b2; }
"""


def page(record: RunRecord, now_s: float) -> str:
    """
    Write the page.

    Args:
        record: of the run.
        now_s: seconds since 1970.
    """
    status = status_of(record, now_s)
    title = escape(str(record.job.get("name", record.path.name)))
    body = [
        *_head(record, status, title),
        *_loss(record),
        *_evaluations(record),
        *_time(record),
        *_exchange(record),
        *_staleness(record),
        *pipeline(record),
        *_setbacks(record),
        *_checkpoints(record),
        *_all_figures(record),
        *_job(record),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _head(record: RunRecord, status: Status, title: str) -> Iterator[str]:
    kind = _STATUS.get(status.word, "bad")
    yield f'<h1>{title} <span class="badge {kind}">{escape(status.word)}</span></h1>'
    detail = f" · {escape(status.detail)}" if status.detail else ""
    yield f'<p class="quiet">{escape(record.path.name)}{detail}</p>'
    for note in record.notes:
        yield f'<div class="note">{escape(note)}</div>'
    shown = "".join(
        f"<div><span>{escape(name)}</span>{escape(value)}</div>" for name, value in facts(record)
    )
    yield f'<div class="facts">{shown}</div>'
    if status.error:
        yield f"<h2>Error</h2><pre>{escape(status.error)}</pre>"


def _loss(record: RunRecord) -> Iterator[str]:
    yield "<h2>Loss</h2>"
    if not record.steps:
        yield "<p>No step has been made yet.</p>"
        return
    means = binned(record.steps, 1000, lambda step: step.loss)
    points = [(float(start), value) for start, _, value in means]
    reach = len(points) // 50
    smooth = smoothed([y for _, y in points], reach)
    series = [Series("training", points, faint=True)] if reach else []
    told = "training, smoothed" if reach else "training"
    series.append(Series(told, [(x, y) for (x, _), y in zip(points, smooth, strict=True)]))
    for metric in metrics(record.evaluations):
        if metric.name == "loss":
            series.append(Series("evaluation", metric.points, PALETTE[5], dots=True))
    yield curves(series, "steps", marks=_marks(restarts(record)))


def _marks(found: Sequence[Restart]) -> list[Mark]:
    return [
        Mark(
            one.setback.step, f"after step {one.setback.step}: {one.setback.cause.splitlines()[0]}"
        )
        for one in found
    ]


def _evaluations(record: RunRecord) -> Iterator[str]:
    if not record.evaluations:
        return
    yield "<h2>Evaluations</h2>"
    found = metrics(record.evaluations)
    others = [metric for metric in found if metric.name != "loss"]
    for number_of, metric in enumerate(others):
        if len(metric.points) > 1:
            colour = PALETTE[(2 + number_of) % len(PALETTE)]
            yield f"<h3>{escape(metric.name)}</h3>"
            yield curves([Series(metric.name, metric.points, colour, dots=True)], "steps")
    rows = [
        [str(one.step), *(number(one.metrics.get(metric.name)) for metric in found)]
        for one in record.evaluations
    ]
    table = _table(["after step", *(metric.name for metric in found)], rows)
    yield table if len(rows) <= _ROWS else _folded(f"all {len(rows)} evaluations", table)


def _time(record: RunRecord) -> Iterator[str]:
    parts = time_parts(record.steps)
    if not parts:
        return
    colours = {p.name: _PARTS.get(p.name, PALETTE[3]) for p in parts}
    yield "<h2>Where the time went</h2>"
    yield bar([(p.name, p.share, colours[p.name], f"{p.name}: {p.total_s:.3g} s") for p in parts])
    by_part = [binned(record.steps, _COLUMNS, _milliseconds(name)) for name in colours]
    names = [part.name for part in parts]
    stacks = []
    for runs in zip(*by_part, strict=True):
        first, stop, _ = runs[0]
        told = f"step {first}" if stop - first == 1 else f"steps {first} to {stop - 1}"
        means = dict(zip(names, (mean for _, _, mean in runs), strict=True))
        stacks.append(Stack(first, stop, told, means))
    yield "<h3>Milliseconds per step</h3>"
    most = usual_most(sum(stack.values.values()) for stack in stacks)
    yield columns(colours, stacks, most, "steps", "ms")
    rows = [
        [p.name, f"{p.total_s:.2f} s", f"{p.share:.1%}", *(_ms(s) for s in (p.median_s, p.p95_s))]
        for p in parts
    ]
    yield _table(["part", "total", "share", "median step", "95th percentile"], rows)
    yield (
        '<p class="quiet">Of each part the slowest rank\'s time, so parts may add up to more than '
        "the step took. Median and percentile without the first step.</p>"
    )


def _exchange(record: RunRecord) -> Iterator[str]:
    layers = {"waiting_s": PALETTE[1], "working_s": PALETTE[0]}
    there = [n for n in layers if any(step.figures.get(n) for step in record.steps)]
    lines = figure_lines(mean_figures(record.steps))
    if not there and not lines:
        return
    yield "<h2>Exchange</h2>"
    yield _table([], [[name, text] for name, text in lines])
    waits = {"waiting_s": "waiting for others", "working_s": "working"}
    series = [
        Series(waits[name], _curve(binned(record.steps[1:], 300, _figure(name))), colour)
        for name, colour in layers.items()
        if name in there
    ]
    if len(record.steps) > 1 and series:
        yield "<h3>Milliseconds per step, of the rank with the most</h3>"
        yield curves(series, "steps", height=200, from_zero=True)


def _curve(runs: Sequence[tuple[int, int, float]]) -> list[tuple[float, float]]:
    return [(float(first), mean) for first, _, mean in runs]


def _milliseconds(part: str) -> Callable[[StepSummary], float]:
    return lambda step: step.seconds.get(part, 0.0) * 1e3


def _figure(name: str) -> Callable[[StepSummary], float]:
    return lambda step: step.figures.get(name, math.nan) * 1e3


def _staleness(record: RunRecord) -> Iterator[str]:
    counts = staleness(record.steps)
    if not counts:
        return
    total = counts.total()
    yield "<h2>Staleness</h2>"
    yield "<p>Updates between pull and push of the stalest gradient of a step.</p>"
    stacks = [
        Stack(n - 0.5, n + 0.5, f"staleness {n}", {"steps": counts[n]})
        for n in range(max(counts) + 1)
    ]
    most = float(max(counts.values()))
    yield columns({"steps": PALETTE[1]}, stacks, most, "staleness", "steps", height=180)
    mean = sum(value * count for value, count in counts.items()) / total
    yield f"<p>Mean {mean:.2f}, largest {max(counts)}, over {total} steps.</p>"


def _setbacks(record: RunRecord) -> Iterator[str]:
    found = restarts(record)
    if not found:
        return
    yield "<h2>Setbacks and recoveries</h2>"
    yield _table(
        ["attempt", "after step", "cause", "replaced", "back at work"], restart_lines(found)
    )


def _checkpoints(record: RunRecord) -> Iterator[str]:
    if record.saved:
        table = _table(["after step", "size", "took"], checkpoint_lines(record.saved))
        many = len(record.saved) > _ROWS
        yield "<h2>Checkpoints</h2>"
        yield _folded(f"all {len(record.saved)} that were made", table) if many else table


def _all_figures(record: RunRecord) -> Iterator[str]:
    rows = [
        [row.name, *(f"{value:.4g}" for value in (row.mean, row.least, row.most, row.last))]
        for row in figure_rows(record.steps)
    ]
    if rows:
        table = _table(["figure", "mean", "least", "most", "last"], rows)
        yield "<h2>All figures</h2>" + _folded("names and units: docs/metrics.md", table)


def _job(record: RunRecord) -> Iterator[str]:
    if record.job_text:
        yield "<h2>Job</h2>" + _folded("job.yaml", f"<pre>{escape(record.job_text)}</pre>")


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; columns of numbers are flush right."""
    width = max(map(len, [heads, *rows]))
    flush = [bool(heads) and all(_numeric(row[column]) for row in rows) for column in range(width)]

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="n"' if right else "" for right in flush]
        inner = [f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)]
        return f"<tr>{''.join(inner)}</tr>"

    head = line("th", heads) if heads else ""
    return f"<table>{head}{''.join(line('td', row) for row in rows)}</table>"


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] == "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
