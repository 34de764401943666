"""What a run came to: `Result`, which `Trainer.fit` gives."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

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
"""Steps, evaluations and others that a `Result` keeps at least."""


@dataclass
class Result:
    """What a run came to."""

    path: Path
    """The run directory."""
    checkpoint: Path | None
    """The trained model as safetensors; None: the job did not ask for it."""
    history: list[StepSummary] = field(default_factory=list, repr=False)
    """The last steps, at least ten thousand; `metrics.jsonl` has all. So of all lists here."""
    totals: StepTotals = field(default_factory=StepTotals, repr=False)
    """Sums over every step."""
    evaluations: list[EvalSummary] = field(default_factory=list, repr=False)
    checkpoints: list[Saved] = field(default_factory=list, repr=False)
    """Those that came to the disk, oldest first; older ones may be deleted by now."""
    best_checkpoint: Path | None = None
    """The best one by `checkpoint.keep_best`, which is never deleted; None: there is none."""
    stopped: str | None = None
    """Why the run ended before its last step; None: it made all of them."""
    failures: list[FailureEvent] = field(default_factory=list, repr=False)
    """Failures after which the run went on."""
    resizes: list[Resized] = field(default_factory=list, repr=False)
    """Changes of the number of workers, of a run whose workers make every step together."""
    reported: bool = False
    """Whether the steps are what a train function reported, and their figures its own."""
    seconds: float = 0.0
    """From `fit` to the trained model."""
    url: str | None = None
    """URL of the run directory's copy, where `storage_path` is a URL."""

    def add(self, summary: Summary) -> None:
        """Take one more piece of the run's history."""
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
        """Whether the run's last step was not made, as far as is known."""
        last = self.history[-1] if self.history else None
        return last is None or last.of == 0 or last.step < last.of

    @property
    def metrics(self) -> dict[str, float]:
        """
        The last figures: `loss` of the last step, and `eval_*` of the last evaluation; of a train
        function all that it reported last.
        """
        last = {"loss": self.history[-1].loss} if self.history else {}
        if self.reported and self.history:
            last |= self.history[-1].figures
        if self.evaluations:
            newest = max(self.evaluations, key=lambda one: one.step)  # they may come in any order
            last |= {f"eval_{k}": v for k, v in newest.metrics.items()}
        return last

    def rows(self) -> list[tuple[str, str]]:
        """Give names and values of the short table."""
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

    def __str__(self) -> str:
        """Give the table as lines: a name and its value on each."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _repr_html_(self) -> str:
        """Give the table for a notebook."""
        cells = (
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table>{''.join(cells)}</table>"


def _append(items: list[T], item: T) -> None:
    """Append to a bounded list; the oldest half goes when it is full."""
    items.append(item)
    if len(items) >= 2 * KEPT:
        del items[:KEPT]
