"""
Callbacks: the user's hooks that the driver calls during a run.

A callback that raises is removed with a warning, and the run continues. A callback that does not
return blocks the driver, which names it in a warning; on Ray, workers continue and the model is
still saved.

Trackers of a job are callbacks, each with its own thread, so that a slow server blocks nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from typing_extensions import override

from distplat.platform.disk import BackgroundWriter
from distplat.platform.errors import Interrupted, Problem, SpecError, hint
from distplat.platform.progress import (
    EarlyStopReached,
    EvalSummary,
    FailureEvent,
    Recovery,
    Resized,
    Saved,
    StepSummary,
    Summary,
)
from distplat.platform.spec import Job
from distplat.platform.trackers import Tracker, TrackerSpec, open_tracker, points_of

if TYPE_CHECKING:
    from distplat.actors.result import Result


logger = logging.getLogger(__name__)


class Callback:
    """
    Base class of callbacks. Override the methods that you need; the others do nothing.

    Callbacks are called in the driver, one after the other, while workers continue. `on_step` is
    called once per step, in order, even if a step is repeated after a failure. If a callback is so
    slow that 100,000 events wait, later steps are dropped until it has caught up, and a warning
    gives their number.
    """

    def on_start(self, job: Job, run: str, path: Path) -> None:
        """
        Called when the run directory exists, before actors are created.

        Args:
            job: the resolved job.
            run: the run's name.
            path: the run directory.
        """

    def on_step(self, step: StepSummary) -> None:
        """Called when all ranks have finished a step."""

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        """Called when all ranks have finished an evaluation."""

    def on_checkpoint(self, checkpoint: Saved) -> None:
        """Called when a checkpoint has been written."""

    def on_failure(self, failure: FailureEvent) -> None:
        """Called when workers or servers were lost and the run recovers."""

    def on_recovery(self, recovery: Recovery) -> None:
        """Called when all workers train again after a failure."""

    def on_resize(self, resized: Resized) -> None:
        """Called when the run continues with another number of workers."""

    def should_stop(self) -> bool | str:
        """
        Return whether to end the run early; called after each step and evaluation.

        A train function learns of it through `distplat.should_stop()`.

        Returns:
            True, or the reason: all workers end after the same step, as after the last one.
        """
        return False

    def on_end(self, result: Result, error: BaseException | None) -> None:
        """
        Called when the run is over and its files are written.

        Args:
            result: result of the run, possibly incomplete.
            error: error of the run; None: it succeeded.
        """


_LONG_S = 120.0
"""Seconds after which a warning names the callback that has not returned."""
_LOOK_S = 1.0

_EVENTS = {name for name in vars(Callback) if name.startswith("on_")}


def check_callbacks(callbacks: Sequence[object]) -> None:
    """
    Validate the callbacks of a `Trainer`.

    Raises:
        SpecError: an object is no `Callback`, or has a method that would never be called.
    """
    problems = []
    for number, callback in enumerate(callbacks):
        where, name = ("callbacks", number), type(callback).__name__
        if not isinstance(callback, Callback):
            text = f"{name} is no distplat.Callback"
            problems.append(Problem(where, text, "hand in objects of a class that derives from it"))
            continue
        for method in dir(callback):
            if method.startswith("on_") and method not in _EVENTS:
                text = f"{name}.{method} would never be called"
                problems.append(Problem(where, text, hint(method, sorted(_EVENTS))))
    if problems:
        raise SpecError(*problems)


class Callbacks:
    """
    The callbacks of one run.

    Args:
        callbacks: callbacks, in calling order.
        max_time_s: time limit of the run; None: no limit.
        clock: clock in seconds.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        max_time_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._active = list(callbacks)
        self._max_time_s, self._clock = max_time_s, clock
        self._start_time, self._stepped = clock(), False
        self.stop: str | None = None  #: reason to end the run early
        self._running: tuple[Callback, float] | None = None  #: callback in progress, start time
        self._over = threading.Event()

    def ending(self) -> bool:
        """Return whether to end the run early; polled by the driver."""
        limit_s = self._max_time_s
        if limit_s is not None and self._stepped and self.stop is None:
            elapsed = self._clock() - self._start_time
            self.stop = f"max_time_s: {limit_s:g} s are over" if elapsed >= limit_s else None
        return self.stop is not None

    def start(self, job: Job, run: str, path: Path) -> None:
        """Call `on_start` of all callbacks."""
        threading.Thread(target=self._watch_calls, name="callbacks", daemon=True).start()
        self._call_each(lambda callback: callback.on_start(job, run, path))

    def tell(self, summary: Summary) -> None:
        """Call the method of an event on all callbacks."""
        match summary:
            case StepSummary():
                self._stepped = True
                self._call_each(lambda callback: callback.on_step(summary))
                self._call_each(self._check_stop)
            case EvalSummary():
                self._call_each(lambda callback: callback.on_evaluation(summary))
                self._call_each(self._check_stop)
            case Saved():
                self._call_each(lambda callback: callback.on_checkpoint(summary))
            case FailureEvent():
                self._call_each(lambda callback: callback.on_failure(summary))
            case Recovery():
                self._call_each(lambda callback: callback.on_recovery(summary))
            case Resized():
                self._call_each(lambda callback: callback.on_resize(summary))
            case EarlyStopReached():
                self.stop = self.stop or summary.reason

    def _check_stop(self, callback: Callback) -> None:
        """Call `should_stop`; the first callback that returns true gives the reason."""
        if self.stop is None and (answer := callback.should_stop()):
            name = type(callback).__name__
            self.stop = answer if isinstance(answer, str) else f"{name}.should_stop()"

    def end(self, result: Result, error: BaseException | None) -> None:
        """Call `on_end` of all callbacks."""
        try:
            self._call_each(lambda callback: callback.on_end(result, error))
        finally:
            self._over.set()

    def _call_each(self, call: Callable[[Callback], object]) -> None:
        for callback in list(self._active):
            self._running = callback, self._clock()
            try:
                call(callback)
            except KeyboardInterrupt:  # Ctrl-C of the user
                raise
            except BaseException as error:  # also SystemExit, which would end the driver
                # Not `remove`, which compares by equality: two callbacks may be equal.
                self._active = [other for other in self._active if other is not callback]
                name, error_name = type(callback).__name__, type(error).__name__
                text = "the callback %s raised %s: %s; the run continues without it"
                logger.warning(text, name, error_name, error)
            finally:
                self._running = None

    def _watch_calls(self) -> None:
        """Log a warning that names a callback which does not return."""
        warned: list[Callback] = []
        while not self._over.wait(_LOOK_S):
            callback, since = self._running or (None, 0.0)
            if callback is None or self._clock() - since < _LONG_S:
                continue
            if any(other is callback for other in warned):
                continue
            warned.append(callback)
            text = (
                "the callback %s has not returned for %.0f s: the driver waits for it, workers and "
                "what they have trained do not; Ctrl-C, if need be twice, ends the run"
            )
            logger.warning(text, type(callback).__name__, _LONG_S)


_CLOSE_S = 60.0
"""Timeout for all trackers together at the end of a run."""
_CLOSE_STOPPED_S = 10.0
"""The same for a run that was stopped: the user may be about to kill the process."""
_SAY_AFTER_S = 2.0
"""Seconds after which a warning names the trackers that are waited for."""


class Tracking(Callback):
    """
    The trackers of a run.

    Args:
        specs: the job's trackers.
        before: directory of the run that this run resumes; None: a new run.
    """

    def __init__(self, specs: Sequence[TrackerSpec], before: Path | None) -> None:
        self._specs, self._before = specs, before
        self._writers: dict[str, BackgroundWriter[_TrackerEvent]] = {}  #: empty before `on_start`

    @override
    def on_start(self, job: Job, run: str, path: Path) -> None:
        self._writers = {spec.name: self._writer(spec, job, path) for spec in self._specs}

    def _writer(self, spec: TrackerSpec, job: Job, path: Path) -> BackgroundWriter[_TrackerEvent]:
        """Create a tracker's thread, which also imports its library, as this takes seconds."""
        tracker_writer = _TrackerWriter(partial(open_tracker, spec, job, path, self._before))
        warn = partial(logger.warning, "%s: %s", spec.name)
        return BackgroundWriter(tracker_writer, warn, where="its server")

    @override
    def on_step(self, step: StepSummary) -> None:
        self._send(step)

    @override
    def on_evaluation(self, evaluation: EvalSummary) -> None:
        self._send(evaluation)

    @override
    def on_end(self, result: Result, error: BaseException | None) -> None:
        """Send the end of the run, and wait until all events are sent or the timeout is over."""
        self._send(error is not None)
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        limit_s = _CLOSE_STOPPED_S if stopped else _CLOSE_S
        deadline = time.monotonic() + limit_s
        if late := [
            name for name, writer in self._writers.items() if not writer.wait(_SAY_AFTER_S)
        ]:
            text = "the run is over; its last figures are on their way to %s, %.0f s at most"
            logger.warning(text, ", ".join(late), max(0.0, deadline - time.monotonic()))
        for writer in self._writers.values():
            writer.close(max(0.0, deadline - time.monotonic()))

    def _send(self, event: _TrackerEvent) -> None:
        for writer in self._writers.values():
            writer.put(event)


_TrackerEvent: TypeAlias = StepSummary | EvalSummary | bool
"""A bool marks the end of the run: whether it failed."""


class _TrackerWriter:
    """
    Writes events to one tracker.

    Args:
        open_tracker: opens the tracker, at the first call.
    """

    def __init__(self, open_tracker: Callable[[], Tracker]) -> None:
        self._open = open_tracker
        self._tracker: Tracker | None = None
        self._error: BaseException | None = None  #: error of `open_tracker`

    def __call__(self, event: _TrackerEvent) -> None:
        if self._error is not None:
            raise self._error
        if self._tracker is None:
            try:
                self._tracker = self._open()
            except BaseException as error:  # do not retry: it may be slow or ask for a password
                self._error = error
                raise
        if isinstance(event, bool):
            self._tracker.close(event)
        else:
            self._tracker.write(event.step, points_of(event))
