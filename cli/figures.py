"""A strategy's figures (docs/metrics.md) in words, for the table at the end of a run."""

import re
from collections.abc import Iterable, Sequence

from distplat.platform.progress import Resized, Setback, StepSummary

Figures = dict[str, float]

_SHARD = re.compile(r"shard_\d+_apply_s")
_LOAD = ("apply_s", "queue_s", "queue_depth", "in_bytes", "out_bytes")
_MOST_SHARDS = 4
"""Rows for shards in the table at the end of a run."""


def mean_figures(history: Sequence[StepSummary]) -> Figures:
    """
    Give each figure's mean over the steps that have it.

    The first step is left out where there are others: in it ranks meet and memory is touched first.
    """
    found: dict[str, list[float]] = {}
    for step in history[1:] or history:
        for name, value in step.figures.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def figure_rows(figures: Figures) -> list[tuple[str, str]]:
    """Put the figures into the rows of a table; those that say nothing are left out."""
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


def restart_rows(setbacks: Iterable[Setback]) -> list[tuple[str, str]]:
    """Say which workers were replaced, and from where the run went on."""
    return [
        (
            "" if number else "restarts",
            f"{', '.join(setback.replaced) or 'nobody'} replaced, "
            f"went on after step {setback.step}",
        )
        for number, setback in enumerate(setbacks)
    ]


def resize_text(one: Resized) -> str:
    """Say how many workers there are from which step on: `4 workers from step 120 on, ...`."""
    count = f"{one.workers} worker" + ("s" if one.workers > 1 else "")
    return f"{count} from step {one.step} on, stood still {one.seconds:.1f} s"


def checkpoint_rows(steps: Sequence[int], folder: str) -> list[tuple[str, str]]:
    """Say how many checkpoints came to the disk, and where the newest are."""
    if not steps:
        return []
    return [("checkpoints", f"{len(steps)} written, the last of step {steps[-1]}, in {folder}")]


def _servers(figures: Figures) -> list[tuple[str, str]]:
    """Say what each shard had to do; of many, those that had most."""
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


def _load(figures: Figures, start: str) -> str:
    of = {name: figures[start + name] for name in _LOAD}
    return (
        f"{_ms(of['apply_s'])} applying, {_ms(of['queue_s'])} queue, {of['queue_depth']:.2g} deep; "
        f"{size_text(of['in_bytes'])} in, {size_text(of['out_bytes'])} out per worker and step"
    )


def _overlap(figures: Figures) -> str:
    text = f"{_ms(figures['waiting_s'])} waiting, {_ms(figures['working_s'])} working"
    if "hidden_fraction" in figures:
        text += f"; {figures['hidden_fraction']:.0%} behind backward"
    return text


def _pipeline(figures: Figures) -> str:
    between = max(figures["stage_sent_bytes"], figures["stage_received_bytes"])
    bubble = 1 - figures["stage_busy_s"] / figures["pipeline_s"]
    return (
        f"{bubble:.0%} bubble, {figures['bubble_ideal']:.0%} with equal stages; "
        f"{size_text(between)} between stages per step"
    )


def _compression(figures: Figures) -> str:
    whole = figures["saved_bytes"] + figures["sent_bytes"]
    parts = [f"{figures['saved_bytes'] / whole:.0%} of the bytes saved"]
    if "compress_s" in figures:
        parts.append(f"{_ms(figures['compress_s'])} compressing")
    if "saved_s" in figures:
        kind = "saved" if figures["saved_s"] >= 0 else "lost"
        parts.append(f"{_ms(abs(figures['saved_s']))} {kind} per step")
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
