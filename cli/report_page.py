"""
The report of a run as a self-contained HTML page, without scripts and external resources.

The template `report.html.j2` escapes all text of the run (names, paths, errors): a job may be
called `<script>`. This module computes the template's variables.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from distplat.cli.charts import (
    KINDS,
    PALETTE,
    Bar,
    Chart,
    Marker,
    Series,
    Stack,
    bars_of,
    columns,
    curves,
    pipeline_chart,
)
from distplat.cli.figures import (
    checkpoint_lines,
    facts,
    figure_rows,
    mean_figures,
    number,
    restart_lines,
)
from distplat.platform.progress import StepSummary, first_line
from distplat.platform.redaction import redact
from distplat.platform.run_record import RunRecord
from distplat.platform.run_report import (
    PhaseTime,
    axis_limit,
    binned,
    metrics,
    phase_times,
    restarts,
    smoothed,
    staleness,
    status_of,
)
from distplat.platform.run_report import figure_rows as all_figures
from distplat.platform.yaml_source import dump_yaml
from distplat.strategies.algorithms.gantt import Gantt

_COLUMNS = 160
"""Maximum number of columns of a chart; more would be too narrow."""
_PARTS = {"data": "#56b4e9", "compute": "#0072b2", "exchange": "#d55e00", "update": "#009e73"}


def page(record: RunRecord, now_s: float, pipeline: Sequence[Gantt], problem: str) -> str:
    """Return the HTML page; `problem` is the error of an unusable pipeline trace."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["numeric"] = _numeric
    template = files("distplat.cli").joinpath("report.html.j2").read_text(encoding="utf-8")
    parts, measured = phase_times(record.steps, record.every), metrics(record.evaluations)
    return environment.from_string(template).render(
        record=record,
        title=str(record.job.get("name", record.path.name)),
        status=status_of(record, now_s),
        facts=facts(record),
        loss=_loss_chart(record),
        metrics=[metric.name for metric in measured],
        evaluations=[
            [str(entry.step), *(number(entry.metrics.get(metric.name)) for metric in measured)]
            for entry in record.evaluations
        ],
        metric_charts=list(_metric_charts(record)),
        parts=parts,
        colours=_colours(parts),
        time=_time_chart(record, parts),
        exchange=figure_rows(mean_figures(record.steps)),
        waits=_wait_chart(record),
        staleness=_staleness_text(record),
        stale=_staleness_chart(record),
        replicas=[(gantt, _pipeline_timelines(gantt)) for gantt in pipeline],
        problem=problem,
        restarts=restart_lines(restarts(record)),
        checkpoints=checkpoint_lines(record.saved),
        figures=all_figures(record.steps),
        job_text=dump_yaml(redact(record.job)) if record.job else "",
    )


def _loss_chart(record: RunRecord) -> Chart | None:
    if not record.steps:
        return None
    means = binned(record.steps, 1000, lambda step: step.loss)
    points = [(float(start), value) for start, _, value in means]
    reach = len(points) // 50
    smooth = smoothed([y for _, y in points], reach)
    series = [Series("training", points, faint=True)] if reach else []
    name = "training, smoothed" if reach else "training"
    series.append(Series(name, [(x, y) for (x, _), y in zip(points, smooth, strict=True)]))
    for metric in metrics(record.evaluations):
        if metric.name == "loss":
            series.append(Series("evaluation", metric.points, PALETTE[5], dots=True))
    failures = [restart.failure for restart in restarts(record)]
    markers = [Marker(f.step, f"after step {f.step}: {first_line(f.cause)}") for f in failures]
    return curves(series, markers)


def _metric_charts(record: RunRecord) -> Iterator[tuple[str, Chart]]:
    others = [metric for metric in metrics(record.evaluations) if metric.name != "loss"]
    for index, metric in enumerate(others):
        if len(metric.points) > 1:
            colour = PALETTE[(2 + index) % len(PALETTE)]
            yield metric.name, curves([Series(metric.name, metric.points, colour, dots=True)])


def _colours(parts: Sequence[PhaseTime]) -> dict[str, str]:
    return {part.name: _PARTS.get(part.name, PALETTE[3]) for part in parts}


def _time_chart(record: RunRecord, parts: Sequence[PhaseTime]) -> Chart | None:
    """Draw the milliseconds of each part of a step."""
    if not parts:
        return None
    colours = _colours(parts)
    by_part = [binned(record.steps, _COLUMNS, _milliseconds(name)) for name in colours]
    stacks = []
    for runs in zip(*by_part, strict=True):
        first, stop, _ = runs[0]
        text = f"step {first}" if stop - first == 1 else f"steps {first} to {stop - 1}"
        means = dict(zip(colours, (mean for _, _, mean in runs), strict=True))
        stacks.append(Stack(first, stop, text, means))
    most = axis_limit(sum(stack.values.values()) for stack in stacks)
    return columns(colours, stacks, most, "steps", "ms")


def _wait_chart(record: RunRecord) -> Chart | None:
    """Draw the milliseconds per step of the slowest rank, without the first step."""
    names = {"waiting_s": ("waiting for others", 1), "working_s": ("working", 0)}
    series = []
    for name, (label, colour) in names.items():
        if any(step.figures.get(name) for step in record.steps):
            runs = binned(record.steps[1:], 300, _figure(name))
            points = [(float(first), mean) for first, _, mean in runs]
            series.append(Series(label, points, PALETTE[colour]))
    return curves(series, height=220, from_zero=True) if series and len(record.steps) > 1 else None


def _milliseconds(part: str) -> Callable[[StepSummary], float]:
    return lambda step: step.seconds.get(part, 0.0) * 1e3


def _figure(name: str) -> Callable[[StepSummary], float]:
    return lambda step: step.figures.get(name, math.nan) * 1e3


def _staleness_chart(record: RunRecord) -> Chart | None:
    counts = staleness(record.steps)
    if not counts:
        return None
    width = -(-(max(counts) + 1) // _COLUMNS)
    columns_of = Counter[int]()
    for value, count in counts.items():
        columns_of[value // width] += count
    stacks = []
    for column in range(max(columns_of) + 1):
        first, last = column * width, column * width + width - 1
        text = f"staleness {first}" if width == 1 else f"staleness {first} to {last}"
        stacks.append(Stack(first - 0.5, last + 0.5, text, {"steps": columns_of[column]}))
    most = float(max(columns_of.values()))
    return columns({"steps": PALETTE[1]}, stacks, most, "staleness", "steps")


def _staleness_text(record: RunRecord) -> str:
    counts = staleness(record.steps)
    if not counts:
        return ""
    mean = sum(value * count for value, count in counts.items()) / counts.total()
    return f"Mean {mean:.2f}, largest {max(counts)}, over {counts.total()} steps."


def _pipeline_timelines(gantt: Gantt) -> Chart:
    strips = [
        Bar(stage, event.kind, 0, event.kind, event.start_s * 1e3, event.end_s * 1e3)
        for stage, row in enumerate(gantt.communication)
        for event in row
        if event.kind in KINDS
    ]
    title = f"measured: {gantt.pipeline_s * 1e3:.1f} ms, bubble {gantt.bubble:.1%}"
    timelines = {title: bars_of(gantt.measured, 1e3) + strips}
    if gantt.ideal:
        title = f"ideal: {gantt.ideal.makespan * 1e3:.1f} ms, bubble {gantt.ideal.bubble:.1%}"
        timelines[title] = bars_of(gantt.ideal.spans, 1e3)
    return Chart(pipeline_chart(timelines, " ms"))


def _numeric(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """Return for each column whether all its cells are numbers; all False without headers."""
    width = max(map(len, [heads, *rows]))
    return [
        bool(heads) and all(row[n][:1].isdigit() or row[n][:1] == "-" for row in rows)
        for n in range(width)
    ]
