"""A job's trackers, as callbacks: each in a thread, so that a slow server holds nobody up."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distplat.actors.callbacks import Callback
from distplat.platform.background_writer import BackgroundWriter
from distplat.platform.progress import EvalSummary, StepSummary
from distplat.platform.spec import Job
from distplat.platform.trackers import Tracker, TrackerSpec, open_tracker, points_of

if TYPE_CHECKING:
    from distplat.actors.result import Result

logger = logging.getLogger(__name__)

_CLOSE_S = 60.0
"""How long the end of a run waits for a tracker."""


class Tracking(Callback):
    """
    One tracker of a run.

    Args:
        spec: which one.
        before: directory of the run that this one goes on from; None: it begins anew.
    """

    def __init__(self, spec: TrackerSpec, before: Path | None) -> None:
        self._spec, self._before = spec, before
        self._tracker: Tracker | None = None
        self._error: Exception | None = None  #: why it could not be opened

    def on_start(self, job: Job, run: str, path: Path) -> None:
        """Begin: the library is imported in the thread, for that takes seconds."""
        self._open = partial(open_tracker, self._spec, job, path, self._before)
        self._writer = BackgroundWriter(self._write, self._warn)

    def on_step(self, step: StepSummary) -> None:
        """Show a step."""
        self._writer.put(step)

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        """Show an evaluation."""
        self._writer.put(evaluation)

    def on_end(self, result: Result, error: BaseException | None) -> None:
        """Show that the run is over, and wait within reason."""
        self._writer.put(error is not None)
        self._writer.close(_CLOSE_S)

    def _write(self, what: StepSummary | EvalSummary | bool) -> None:
        """Show something; a flag says that the run is over, and whether it failed."""
        if self._error is not None:
            raise self._error
        if self._tracker is None:
            try:
                self._tracker = self._open()
            except Exception as error:  # once: it may take long, or ask for a password
                self._error = error
                raise
        if isinstance(what, bool):
            self._tracker.close(what)
        else:
            self._tracker.write(what.step, points_of(what))

    def _warn(self, text: str) -> None:
        logger.warning("%s: %s", self._spec.name, text)
