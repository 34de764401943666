"""
Text for the metrics of a run: for the table at its end, and for its report.

docs/metrics.md describes the metrics of each strategy.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from distplat.platform.progress import (
    FailureEvent,
    Saved,
    StepSummary,
    StepTotals,
    resize_text,
    steps_text,
)
from distplat.platform.run_record import RunRecord
from distplat.platform.run_report import RestartRecord, metrics, samples_per_s

StepFigures = dict[str, float]

_SHARD = re.compile(r"shard_\d+_apply_s")
_LOAD = ("apply_s", "queue_s", "queue_depth", "in_bytes", "out_bytes")
_MOST_SHARDS = 4
"""Maximum number of shard rows in the table at the end of a run."""


def mean_figures(history: Sequence[StepSummary]) -> StepFigures:
    """Return the mean of each metric over the steps that report it; see `StepTotals`."""
    totals = StepTotals()
    for step in history:
        totals.add(step)
    return totals.figures


def figure_rows(figures: StepFigures) -> list[tuple[str, str]]:
    """Return table rows for the metrics; rows without information are omitted."""
    figures = defaultdict(float, figures)  # a run of another version may lack some of them
    rows = []
    if figures.get("sent_bytes"):
        rows.append(("exchange", f"{size_text(figures['sent_bytes'])} sent per worker and step"))
        if "exposed_s" in figures:
            rows.append(("", _overlap(figures)))
    rows += _servers(figures)
    if figures.get("pipeline_s"):
        rows.append(("pipeline", _pipeline(figures)))
    if figures.get("saved_bytes"):
        rows.append(("compression", _compression(figures)))
    if figures.get("optimizer_state_bytes"):
        memory = size_text(figures["optimizer_state_bytes"])
        rows.append(("memory", f"{memory} of optimizer state per worker"))
    return rows


def restart_text(failure: FailureEvent) -> str:
    """Return a text with the replaced workers and the step from which the run continued."""
    replaced = ", ".join(failure.replaced) or "no actor"
    return f"{replaced} replaced, resumed after step {failure.step}"


def _servers(figures: StepFigures) -> list[tuple[str, str]]:
    """Return rows with the load of each shard; with many shards, only the busiest."""
    if "queue_s" not in figures:
        return []
    count = sum(1 for name in figures if _SHARD.fullmatch(name))
    shards = sorted(range(count), key=lambda i: -figures[f"shard_{i}_apply_s"])[:_MOST_SHARDS]
    if not shards:
        return [("servers", _load(figures, ""))]
    rows = [(f"shard {i}", _load(figures, f"shard_{i}_")) for i in sorted(shards)]
    if len(shards) < count:
        rows.append(("", f"and {count - len(shards)} shards that had less to do"))
    return rows


def _load(figures: StepFigures, prefix: str) -> str:
    apply_s, queue_s, depth, in_bytes, out_bytes = (figures[prefix + name] for name in _LOAD)
    return (
        f"{_ms(apply_s)} applying, {_ms(queue_s)} queue, {depth:.2g} deep; "
        f"{size_text(in_bytes)} in, {size_text(out_bytes)} out per worker and step"
    )


def _overlap(figures: StepFigures) -> str:
    text = f"{_ms(figures['waiting_s'])} waiting, {_ms(figures['working_s'])} working"
    if "hidden_fraction" in figures:
        text += f"; {figures['hidden_fraction']:.0%} behind backward"
    return text


def _pipeline(figures: StepFigures) -> str:
    between = max(figures["stage_sent_bytes"], figures["stage_received_bytes"])
    bubble = 1 - figures["stage_busy_s"] / figures["pipeline_s"]
    return (
        f"{bubble:.0%} bubble, {figures['bubble_ideal']:.0%} with equal stages; "
        f"{size_text(between)} between stages per step"
    )


def _compression(figures: StepFigures) -> str:
    uncompressed = figures["saved_bytes"] + figures["sent_bytes"]
    share = figures["saved_bytes"] / uncompressed if uncompressed else 0.0
    parts = [f"{share:.0%} of the bytes saved"]
    if "compress_s" in figures:
        parts.append(f"{_ms(figures['compress_s'])} compressing")
    if "saved_s" in figures:
        verb = "saved" if figures["saved_s"] >= 0 else "lost"
        parts.append(f"{_ms(abs(figures['saved_s']))} {verb} per step")
    if "error_norm" in figures:
        parts.append(f"error norm {figures['error_norm']:.2g}")
    return ", ".join(parts)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def size_text(count: float) -> str:
    """`3.2 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return (name, value) pairs that summarize a run."""
    rows = [
        ("strategy", strategy(record)),
        ("workers", _workers(record)),
        ("steps", _steps(record)),
    ]
    rate = samples_per_s(record.steps)
    rows.append(("speed", f"{rate:.0f} samples/s" if rate else ""))
    if record.steps:
        rows.append(("last loss", number(record.steps[-1].loss)))
    for metric in metrics(record.evaluations):
        rows.append((f"evaluation: {metric.name}", number(metric.points[-1][1])))
    rows += [("then", resize_text(resized)) for resized in record.resizes]
    if record.saved:
        last = record.saved[-1]
        rows.append(("last checkpoint", f"after step {last.step}, {size_text(last.size)}"))
    resumed = (record.result or {}).get("resumed_from")
    if resumed:
        rows.append(("resumed from", str(resumed)))
    seconds = (record.result or {}).get("seconds")
    if isinstance(seconds, int | float):
        rows.append(("took", clock(float(seconds))))
    return [(name, value) for name, value in rows if value]


def strategy(record: RunRecord) -> str:
    """Return the strategy's name, with the grid sizes of `hybrid`."""
    spec = record.job.get("strategy")
    if not isinstance(spec, Mapping):
        return ""
    name = str(spec.get("name", ""))
    if name != "hybrid":
        return name
    sizes = [f"{axis} {spec[axis]}" for axis in ("pipeline", "tensor", "data") if axis in spec]
    return f"{name}: {', '.join(sizes)}"


def checkpoint_lines(saved: Sequence[Saved]) -> list[list[str]]:
    """Return step, size and duration of each checkpoint."""
    return [[str(entry.step), size_text(entry.size), f"{entry.seconds:.2f} s"] for entry in saved]


def restart_lines(restarts: Sequence[RestartRecord]) -> list[list[str]]:
    """Return attempt, step, cause, replaced workers and recovery time of each restart."""
    return [
        [
            str(restart.failure.attempt),
            str(restart.failure.step),
            restart.failure.cause,
            ", ".join(restart.failure.replaced) or "no actor",
            f"after {restart.recovery.seconds:.1f} s" if restart.recovery else "not yet, or never",
        ]
        for restart in restarts
    ]


def number(value: float | None) -> str:
    """`0.1234`; `not a number` for NaN."""
    if value is None:
        return ""
    return "not a number" if value != value else f"{value:.4g}"


def clock(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def _workers(record: RunRecord) -> str:
    scaling: Any = record.job.get("scaling")
    count = scaling.get("num_workers") if isinstance(scaling, Mapping) else None
    return {None: "", 0: "in one process"}.get(count, str(count))


def _steps(record: RunRecord) -> str:
    if not record.steps:
        return steps_text(0)
    step, total = record.steps[-1].step, record.steps[-1].of
    return f"{step} of {total}" if total > step else str(step)
