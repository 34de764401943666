"""`Result`, the return value of `Trainer.fit`."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from typing_extensions import override

from distplat.platform.progress import (
    Best,
    EvalSummary,
    FailureEvent,
    Resized,
    Saved,
    StepSummary,
    StepTotals,
    Summary,
    steps_text,
)

T = TypeVar("T")

KEPT = 10_000
"""Minimum number of most recent entries in each list of a `Result`."""


@dataclass
class Result:
    """Files, metrics and history of a finished run."""

    path: Path
    """The run directory."""
    checkpoint: Path | None
    """The trained model as safetensors; None: the job does not save it."""
    history: list[StepSummary] = field(default_factory=list, repr=False)
    """The last steps. Each list has at least the last 10,000 entries; `metrics.jsonl` has all."""
    totals: StepTotals = field(default_factory=StepTotals, repr=False)
    """Sums over every step."""
    evaluations: list[EvalSummary] = field(default_factory=list, repr=False)
    checkpoints: list[Saved] = field(default_factory=list, repr=False)
    """Checkpoints that were written, oldest first; the older ones may be deleted by now."""
    best_checkpoint: Path | None = None
    """Best checkpoint by `checkpoint.keep_best`, which is never deleted; None: not configured."""
    stopped: str | None = None
    """Why the run ended before its last step; None: all steps were trained."""
    failures: list[FailureEvent] = field(default_factory=list, repr=False)
    """Failures from which the run recovered."""
    resizes: list[Resized] = field(default_factory=list, repr=False)
    """Changes of the number of workers; synchronous strategies only."""
    reported: bool = False
    """Whether the steps and their metrics were reported by a train function."""
    seconds: float = 0.0
    """Seconds from the call of `fit` to the trained model."""
    url: str | None = None
    """URL of the run directory's copy; None: `storage_path` is not a URL."""

    def add(self, summary: Summary) -> None:
        """Add an event of the run."""
        match summary:
            case StepSummary():
                self.totals.add(summary)
                _append(self.history, summary)
            case EvalSummary():
                _append(self.evaluations, summary)
            case FailureEvent():
                _append(self.failures, summary)
            case Resized():
                _append(self.resizes, summary)
            case Saved():
                _append(self.checkpoints, summary)
            case Best():
                self.best_checkpoint = Path(summary.path)

    @property
    def cut_short(self) -> bool:
        """Whether the last step of the run is missing, or its number is unknown."""
        last = self.history[-1] if self.history else None
        return last is None or last.of == 0 or last.step < last.of

    @property
    def metrics(self) -> dict[str, float]:
        """
        The last metrics: `loss` of the last step and `eval_*` of the last evaluation.

        A train function's last report is included with all its metrics.
        """
        last = {"loss": self.history[-1].loss} if self.history else {}
        if self.reported and self.history:
            last |= self.history[-1].figures
        if self.evaluations:
            newest = max(self.evaluations, key=lambda evaluation: evaluation.step)  # in any order
            last |= {f"eval_{k}": v for k, v in newest.metrics.items()}
        return last

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values of the summary table."""
        table = [("steps", steps_text(self.totals.steps))]
        if self.stopped is not None:
            table.append(("stopped early", self.stopped))
        table += [(name, f"{value:.4g}") for name, value in self.metrics.items()]
        table.append(("took", f"{self.seconds:.1f} s"))
        if self.failures:
            table.append(("restarts", str(len(self.failures))))
        if self.resizes:
            table.append(("workers", f"{self.resizes[-1].workers} at the end"))
        if self.checkpoints:
            table.append(("last checkpoint", self.checkpoints[-1].path))
        if self.best_checkpoint is not None:
            table.append(("best checkpoint", str(self.best_checkpoint)))
        table.append(("run directory", str(self.path)))
        if self.url is not None:
            table.append(("copy", self.url))
        if self.checkpoint is not None:
            table.append(("model", str(self.checkpoint)))
        return table

    @override
    def __str__(self) -> str:
        """Return the table as text, a name and its value per line."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _repr_html_(self) -> str:
        """Return the table as HTML, for notebooks."""
        cells = (
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table>{''.join(cells)}</table>"


def _append(items: list[T], item: T) -> None:
    """Append to a bounded list, which drops its older half when it is full."""
    items.append(item)
    if len(items) >= 2 * KEPT:
        del items[:KEPT]
