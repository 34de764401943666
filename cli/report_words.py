"""The figures of a report in words, for the page and for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from distplat.cli.figures import resize_text, size_text
from distplat.platform.progress import Saved
from distplat.platform.report import Restart, metrics, samples_per_s
from distplat.platform.run_record import RunRecord


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Give what a run is and what came of it, in a few pairs."""
    found = [
        ("strategy", strategy(record)),
        ("workers", _workers(record)),
        ("steps", _steps(record)),
    ]
    rate = samples_per_s(record.steps)
    found.append(("speed", f"{rate:.0f} samples/s" if rate else ""))
    if record.steps:
        found.append(("last loss", number(record.steps[-1].loss)))
    for metric in metrics(record.evaluations):
        found.append((f"evaluation: {metric.name}", number(metric.points[-1][1])))
    found += [("then", resize_text(one)) for one in record.resizes]
    if record.saved:
        last = record.saved[-1]
        found.append(("last checkpoint", f"after step {last.step}, {size_text(last.size)}"))
    resumed = (record.result or {}).get("resumed_from")
    if resumed:
        found.append(("resumed from", str(resumed)))
    seconds = (record.result or {}).get("seconds")
    if isinstance(seconds, int | float):
        found.append(("took", clock(float(seconds))))
    return [(name, value) for name, value in found if value]


def strategy(record: RunRecord) -> str:
    """Give the strategy's name with the options that say most about it."""
    chosen = record.job.get("strategy")
    if not isinstance(chosen, Mapping):
        return ""
    name = str(chosen.get("name", ""))
    if name != "hybrid":
        return name
    sizes = [f"{axis} {chosen[axis]}" for axis in ("pipeline", "tensor", "data") if axis in chosen]
    return f"{name}: {', '.join(sizes)}"


def checkpoint_lines(saved: Sequence[Saved]) -> list[list[str]]:
    """Give step, size and how long it took."""
    return [[str(one.step), size_text(one.size), f"{one.seconds:.2f} s"] for one in saved]


def restart_lines(found: Sequence[Restart]) -> list[list[str]]:
    """Give attempt, step, cause, who was replaced, and how long it took."""
    return [
        [
            str(one.setback.attempt),
            str(one.setback.step),
            one.setback.cause,
            ", ".join(one.setback.replaced) or "nobody",
            f"after {one.recovery.seconds:.1f} s" if one.recovery else "not yet, or never",
        ]
        for one in found
    ]


def number(value: float | None) -> str:
    """`0.1234`; a word where it is no number."""
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
        return "0"
    done, of = record.steps[-1].step, record.steps[-1].of
    return f"{done} of {of}" if of > done else str(done)
