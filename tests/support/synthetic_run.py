"""
A run without workers: the controller and the driver process synthetic reports of ranks.

Tests use it to check that memory does not grow with the number of steps: in the controller's
aggregator and outbox, and in the driver's result, metrics, curves, callbacks, trackers, progress.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs import fields_of

from distplat.actors.actor_group import Launch
from distplat.actors.callbacks import Callback
from distplat.actors.checkpointing import Checkpoints
from distplat.actors.controller_client import RunHandlers
from distplat.actors.result import Result
from distplat.actors.retrying_calls import Outbox
from distplat.actors.trainer import Trainer
from distplat.platform import trackers
from distplat.platform.disk import BackgroundWriter
from distplat.platform.progress import EvalReport, ReportAggregator, StepReport, Summary

RANKS = 2
_STEPS_PER_POLL = 50
"""Steps between two polls of the driver."""
_EVALUATION_EVERY = 10
"""Steps between two evaluations."""
_SECONDS = {"data": 1e-4, "compute": 1e-3, "exchange": 1e-4, "update": 1e-4}
_FIGURES = {"sent_bytes": 4e6, "waiting_s": 0.01, "working_s": 0.02, "exposed_s": 0.01}


class Silent:
    """A tracker that discards all figures."""

    id = "none"

    def __init__(self, project: str, job: Any, folder: Path, known: str | None) -> None: ...

    def write(self, step: int, points: dict[str, float]) -> None:
        """Discard figures."""

    def close(self, failed: bool) -> None:
        """See `Tracker`."""


def _reports(step: int, steps: int) -> Sequence[StepReport | EvalReport]:
    loss = 1.0 + 1.0 / (step + 1)
    reports: list[StepReport | EvalReport] = [
        StepReport(rank, step, step // 1000, loss, 8, dict(_SECONDS), steps, dict(_FIGURES))
        for rank in range(RANKS)
    ]
    if (step + 1) % _EVALUATION_EVERY == 0:
        sums = {"loss": 8 * loss, "accuracy": 4.0}
        reports += [EvalReport(rank, step + 1, 8, dict(sums)) for rank in range(RANKS)]
    return reports


def _job_of(folder: Path, steps: int) -> dict[str, Any]:
    return {
        **fields_of(workers=RANKS),
        "task": "tasks_for_tests:Blobs",
        "storage_path": str(folder),
        "trackers": ["mlflow"],
        "early_stop": {"metric": "loss", "mode": "min", "patience": steps},
        "evaluation": {"every_steps": _EVALUATION_EVERY},
        "checkpoint": {
            "every_steps": 10 * _EVALUATION_EVERY,
            "keep_best": {"metric": "loss", "mode": "min"},
        },
        "max_time_s": 1e7,
    }


def run(
    folder: Path,
    steps: int,
    patch: pytest.MonkeyPatch,
    seen: Callable[[int], object],
    *,
    leased: bool = False,
) -> Result:
    """
    Run the driver with synthetic reports.

    Args:
        folder: for the run directory.
        steps: number of steps.
        patch: replaces Ray by the synthetic reports.
        seen: called with the number of steps at each poll.
        leased: whether steps and evaluations are reported in any order, as under `ps-async`.
    """

    def feed(launch: Launch, handlers: RunHandlers, stopping: object) -> None:
        aggregator = ReportAggregator(RANKS, 0 if leased else None)
        checkpoints = Checkpoints(launch, RANKS, lambda ref: [])
        outbox = Outbox[Summary](10_000)
        for step in range(steps):
            for report in _reports(step, steps):
                for summary in aggregator.add(report):
                    checkpoints.observe(summary)
                    outbox.put(summary)
                    for finished in checkpoints.take_finished():
                        outbox.put(finished)
            if (step + 1) % _STEPS_PER_POLL == 0 or step + 1 == steps:
                for record in outbox.take(step // _STEPS_PER_POLL + 1):
                    handlers.on_summary(record)
                    handlers.ending()
                seen(step + 1)

    def wait(writer: BackgroundWriter[Any], record: Any) -> None:
        writer._queue.maxsize = _STEPS_PER_POLL  # synthetic steps are faster than the disk
        writer._queue.put(record)

    patch.setattr("distplat.actors.trainer.train_on_ray", feed)
    patch.setattr(BackgroundWriter, "put", wait)
    patch.setattr(trackers, "MLflow", Silent)
    patch.setattr("distplat.actors.trainer.check_libraries", lambda job: None)
    tasks = Path(__file__).parents[1] / "cluster"
    return Trainer(
        _job_of(folder, steps), working_dir=tasks, callbacks=[Callback()], progress=True
    ).fit()
