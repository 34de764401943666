"""
What a run looks like: while it runs, and when it is over.

On a terminal one line that lives, and a table; anywhere else plain lines, at most one every two
seconds and one per evaluation, fit for a log file. Nothing here knows where the run runs.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text
from typing_extensions import TypedDict

from distplat.actors.callbacks import Callback
from distplat.cli.figures import (
    checkpoint_rows,
    figure_rows,
    first_line,
    resize_text,
    restart_rows,
)
from distplat.cli.tables import print_pairs
from distplat.platform.checkpoints import FOLDER
from distplat.platform.errors import printable
from distplat.platform.progress import EvalSummary, FailureEvent, Recovery, Resized, StepSummary
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy

if TYPE_CHECKING:
    from pathlib import Path

    from distplat.actors.result import Result

_LINE_EVERY_S = 2.0
_DRAW_EVERY_S = 0.1
_WINDOW = 50


@with_config(ConfigDict(extra="forbid"))
class Facts(TypedDict):
    """How a run ended, in plain values: what `-o json` prints."""

    status: str
    name: str
    strategy: str
    num_workers: int
    steps: int
    seconds: float
    metrics: Mapping[str, float | None]
    samples_per_s: float | None
    time_split: dict[str, float]
    figures: Mapping[str, float | None]
    checkpoints: list[int]
    restarts: list[str]
    resizes: list[str]
    run_directory: str
    stopped: str | None
    best_checkpoint: str | None
    url: str | None
    model: str | None


class View(Callback):
    """
    Draws a run as it goes; also a context manager.

    Args:
        out: where to draw.
        quiet: draw nothing.
    """

    def __init__(self, out: TextIO | None = None, *, quiet: bool = False) -> None:
        self._out = out or sys.stderr
        self.quiet = quiet
        self._pace = _Pace()
        self._last_drawn = float("-inf")
        self._progress: Progress | None = None
        if not quiet and self._out.isatty():
            self._progress = _progress(Console(file=self._out))
            self._bar = self._progress.add_task("starting", total=None, figures="")

    def __enter__(self) -> Self:
        """Begin to draw."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            with suppress(OSError, ValueError):  # it is gone
                self._progress.stop()

    def on_start(self, job: Job, run: str, path: Path) -> None:
        """Say what is about to run."""
        self._say(f"run {run}: {_cast(job)}, starting")

    def on_step(self, step: StepSummary) -> None:
        """Show a step; those that come too fast to read are passed over."""
        if self.quiet:
            return
        now = time.monotonic()
        self._pace.add(step, now)
        every = _DRAW_EVERY_S if self._progress is not None else _LINE_EVERY_S
        is_last = step.step == step.of
        if now - self._last_drawn >= every or is_last:
            self._last_drawn = now
            self._draw(step, now)

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        """Show an evaluation."""
        self._say(f"evaluation after step {evaluation.step}  {_figures(evaluation.metrics)}")

    def on_failure(self, failure: FailureEvent) -> None:
        """Say that workers were lost."""
        who = ", ".join(failure.replaced) or "nobody"
        self._say(
            f"failure: {first_line(failure.cause)}\n"
            f"attempt {failure.attempt}: replacing {who}, going on after step {failure.step}"
        )

    def on_recovery(self, recovery: Recovery) -> None:
        """Say that all are at work again."""
        seconds = f"{recovery.seconds:.1f} s"
        self._say(f"attempt {recovery.attempt}: all workers are at work after {seconds}")

    def on_resize(self, resized: Resized) -> None:
        """Say how many workers there are."""
        self._say(f"attempt {resized.attempt}: {resize_text(resized)}")

    def _draw(self, summary: StepSummary, now: float) -> None:
        figures = f"epoch {summary.epoch + 1}  loss {summary.loss:.4g}  {self._pace.text(now)}"
        at = f"step {summary.step}/{summary.of}" if summary.of else f"step {summary.step}"
        if self._progress is None:
            self._say(f"{at}  {figures}")
            return
        self._progress.update(
            self._bar,
            description=at,
            completed=summary.step,
            total=summary.of or None,
            figures=figures,
        )

    def _say(self, line: str) -> None:
        if self.quiet:
            return
        try:
            if self._progress is not None:
                self._progress.console.print(Text(printable(line)))
            else:
                print(printable(line), file=self._out, flush=True)
        except (OSError, ValueError):  # nobody reads any more, or the file was closed
            self.quiet = True


class _Pace:
    """Samples per second of the last steps, and how long the rest will take."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._first: tuple[int, float] | None = None
        self._last: StepSummary | None = None

    def add(self, summary: StepSummary, now: float) -> None:
        """Take one more step."""
        self._recent.append((summary.samples, sum(summary.seconds.values())))
        self._first = self._first or (summary.step, now)
        self._last = summary

    def text(self, now: float) -> str:
        """`1234 samples/s  eta 0:12`."""
        samples = sum(count for count, _ in self._recent)
        busy = sum(seconds for _, seconds in self._recent)
        rate = f"{samples / busy:.0f} samples/s" if busy else ""
        if self._first is None or self._last is None:
            return rate
        done = self._last.step - self._first[0]
        left = self._last.of - self._last.step
        if done == 0 or left <= 0:
            return rate
        return f"{rate}  eta {_clock((now - self._first[1]) / done * left)}"


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        transient=True,
    )


def facts_of(job: Job, result: Result) -> Facts:
    """Put together what a run came to."""
    totals = result.totals
    split, busy = totals.seconds, sum(totals.seconds.values())
    return {
        "status": "SUCCEEDED",
        "name": job.name,
        "strategy": job.strategy.name,
        "num_workers": job.scaling.num_workers,
        "steps": totals.steps,
        "seconds": round(result.seconds, 3),
        "metrics": result.metrics,
        "samples_per_s": round(totals.samples / busy, 1) if busy else None,
        "time_split": {part: round(s / busy, 4) for part, s in split.items()} if busy else {},
        "figures": totals.figures,
        "checkpoints": [saved.step for saved in result.checkpoints],
        "restarts": [text for _, text in restart_rows(result.setbacks)],
        "resizes": [resize_text(one) for one in result.resizes],
        "run_directory": str(result.path),
        "stopped": result.stopped,
        "best_checkpoint": str(result.best_checkpoint) if result.best_checkpoint else None,
        "url": result.url,
        "model": str(result.checkpoint) if result.checkpoint else None,
    }


def to_json(value: object, indent: int | None = 2) -> str:
    """Write JSON; a loss that is no number any more becomes null, for JSON has no NaN."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_result(facts: Facts) -> None:
    """Print how a run ended to stdout: a table on a terminal, aligned text elsewhere."""
    print_pairs(_rows(facts))


def read_facts(text: str) -> Facts | None:
    """Read the JSON of `Facts`; None: it is something else, for anybody may print into a log."""
    try:
        return TypeAdapter(Facts).validate_json(text, strict=True)
    except ValidationError:
        return None


def _rows(facts: Facts) -> list[tuple[str, str]]:
    workers = facts["num_workers"]
    metrics = {name: _number(value) for name, value in facts["metrics"].items()}
    rows = [
        ("strategy", facts["strategy"]),
        ("workers", str(workers) if workers else "0 (in this process)"),
        ("steps", str(facts["steps"])),
        *([("stopped early", facts["stopped"])] if facts["stopped"] else []),
        ("final loss", metrics.pop("loss", "")),
    ]
    if metrics:
        figures = [f"{name.removeprefix('eval_')} {shown}" for name, shown in metrics.items()]
        rows.append(("evaluation", "  ".join(figures)))
    if facts["samples_per_s"]:
        shares = [f"{part} {share:.0%}" for part, share in facts["time_split"].items()]
        rows += [("speed", f"{facts['samples_per_s']:.0f} samples/s"), ("time", ", ".join(shares))]
    finite = {name: value for name, value in facts["figures"].items() if value is not None}
    rows += figure_rows(finite)
    for name, texts in (("restarts", facts["restarts"]), ("resizes", facts["resizes"])):
        rows += [("" if n else name, text) for n, text in enumerate(texts)]
    folder = f"{facts['run_directory']}/{FOLDER}"
    rows += checkpoint_rows(facts["checkpoints"], folder)
    if facts["best_checkpoint"]:
        rows.append(("best checkpoint", facts["best_checkpoint"]))
    rows += [("took", f"{facts['seconds']:.1f} s"), ("run directory", facts["run_directory"])]
    if facts["url"]:
        rows.append(("copy", facts["url"]))
    if facts["model"]:
        rows.append(("model", facts["model"]))
    return rows


def _figures(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {_number(value)}" for name, value in metrics.items())


def _number(value: float | None) -> str:
    return "not a number" if value is None or math.isnan(value) else f"{value:.4g}"


def _cast(job: Job) -> str:
    count = job.scaling.num_workers
    workers = "1 worker" if count == 1 else f"{count} workers"
    detail = make_strategy(job).detail()
    name = f"{job.strategy.name} ({detail})" if detail else job.strategy.name
    return f"{name}, {workers if count else 'in this process'}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
