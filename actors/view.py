"""
Progress display of a run.

A terminal gets a progress bar. Other streams get plain lines, at most one every two seconds and one
per evaluation, fit for a log file.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text
from typing_extensions import override

from distplat.actors.callbacks import Callback
from distplat.platform.errors import encodable, printable
from distplat.platform.progress import (
    EvalSummary,
    FailureEvent,
    Recovery,
    Resized,
    StepSummary,
    first_line,
    number_text,
    resize_text,
)
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy

if TYPE_CHECKING:
    from distplat.actors.result import Result

_LINE_EVERY_S = 2.0
_DRAW_EVERY_S = 0.1
_WINDOW = 50


def view_here() -> View | None:
    """Return a view for a terminal or a notebook; None: the process has neither."""
    if "ipykernel" in sys.modules:
        return View(sys.stdout)  # notebooks show stderr in red
    return View(sys.stderr) if is_terminal(sys.stderr) else None


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; False for closed streams."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, OSError, ValueError):
        return False


def has_colors(*streams: TextIO | None) -> bool:
    """
    Return whether to print colours: NO_COLOR, then FORCE_COLOR, else all streams are terminals.

    An empty variable counts as unset.
    """
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or all(is_terminal(stream) for stream in streams)


def terminal_console(stream: TextIO) -> Console:
    """Return rich's console for a terminal; see `has_colors`."""
    # rich treats an empty FORCE_COLOR as "not a terminal".
    return Console(file=stream, force_terminal=os.environ.get("FORCE_COLOR") == "" or None)


class View(Callback):
    """
    Callback that shows the progress of a run.

    Args:
        out: stream to print to.
        quiet: print nothing.
    """

    def __init__(self, out: TextIO | None = None, *, quiet: bool = False) -> None:
        self._out: TextIO | None = out or sys.stderr  # None if the process was started without it
        self.quiet = quiet or self._out is None
        self._throughput = _Throughput()
        self._last_drawn = float("-inf")
        self._progress: Progress | None = None
        if not quiet and self._out is not None and is_terminal(self._out):
            self._progress = _progress(terminal_console(self._out))
            self._bar = self._progress.add_task("starting", total=None, figures="")

    @override
    def on_start(self, job: Job, run: str, path: Path) -> None:
        """Start the display, and print a description of the run."""
        if self._progress is not None:
            self._progress.start()
        self._print(f"run {run}: {_description(job)}, starting")

    @override
    def on_step(self, step: StepSummary) -> None:
        """Show a step; steps in quick succession are skipped."""
        if self.quiet:
            return
        now = time.monotonic()
        self._throughput.add(step, now)
        every = _DRAW_EVERY_S if self._progress is not None else _LINE_EVERY_S
        is_last = step.step == step.of
        if now - self._last_drawn >= every or is_last:
            self._last_drawn = now
            self._draw(step, now)

    @override
    def on_evaluation(self, evaluation: EvalSummary) -> None:
        """Show an evaluation."""
        figures = [f"{name} {number_text(value)}" for name, value in evaluation.metrics.items()]
        when = f"after step {evaluation.step}" if evaluation.step else "before the first step"
        self._print("  ".join([f"evaluation {when}", *figures]))

    @override
    def on_failure(self, failure: FailureEvent) -> None:
        """Print the failure and the replaced workers."""
        replaced = ", ".join(failure.replaced) or "no actor"
        self._print(
            f"failure: {first_line(failure.cause)}\n"
            f"attempt {failure.attempt}: replacing {replaced}, going on after step {failure.step}"
        )

    @override
    def on_recovery(self, recovery: Recovery) -> None:
        """Print the time of the recovery."""
        seconds = f"{recovery.seconds:.1f} s"
        self._print(f"attempt {recovery.attempt}: all workers are at work after {seconds}")

    @override
    def on_resize(self, resized: Resized) -> None:
        """Print the new number of workers."""
        self._print(f"attempt {resized.attempt}: {resize_text(resized)}")

    @override
    def on_end(self, result: Result, error: BaseException | None) -> None:
        """Restore the terminal."""
        if self._progress is not None:
            with suppress(OSError, ValueError):  # the stream is closed
                self._progress.stop()

    def _draw(self, summary: StepSummary, now: float) -> None:
        figures = (
            f"epoch {summary.epoch + 1}  loss {summary.loss:.4g}  {self._throughput.text(now)}"
        )
        at = f"step {summary.step}/{summary.of}" if summary.of else f"step {summary.step}"
        if self._progress is None:
            self._print(f"{at}  {figures}")
            return
        self._progress.update(
            self._bar,
            description=at,
            completed=summary.step,
            total=summary.of or None,
            figures=figures,
        )

    def _print(self, line: str) -> None:
        if self.quiet:
            return
        try:
            if self._progress is not None:
                self._progress.console.print(Text(printable(line)))
            else:
                assert self._out is not None, "without a stream, quiet is set"
                print(encodable(printable(line), self._out), file=self._out, flush=True)
        except (OSError, ValueError):  # the reader has gone, or the file is closed
            self.quiet = True


class _Throughput:
    """Samples per second of the last steps, and the remaining time."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._first: tuple[int, float] | None = None
        self._last: StepSummary | None = None

    def add(self, summary: StepSummary, now: float) -> None:
        """Add a step."""
        self._recent.append((summary.samples, sum(summary.seconds.values())))
        self._first = self._first or (summary.step, now)
        self._last = summary

    def text(self, now: float) -> str:
        """Return, for example, `1234 samples/s  eta 0:12`."""
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


def _description(job: Job) -> str:
    count = job.scaling.num_workers
    workers = "1 worker" if count == 1 else f"{count} workers"
    detail = make_strategy(job).detail()
    name = f"{job.strategy.name} ({detail})" if detail else job.strategy.name
    return f"{name}, {workers if count else 'in this process'}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
