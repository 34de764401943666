"""
Callbacks: what a user has called in the driver while a run goes on.

They are guests: one that raises is warned of once, and the run goes on without it. One that does
not return is waited for, and named; on Ray workers go on, and their model is written all the same.

A job's trackers are callbacks, each in a thread of its own, so that a slow server holds nobody up.
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
    Base of callbacks; its methods do nothing, and a class of yours has those that it needs.

    They are called in the driver, one after the other, while workers go on. Each step is told once,
    in order, however often it was made. Where a callback is so slow that 100,000 events wait, later
    steps are not told until it has caught up, and a warning says how many.
    """

    def on_start(self, job: Job, run: str, path: Path) -> None:
        """
        The run directory is there; actors are about to be.

        Args:
            job: the resolved job.
            run: the run's name.
            path: the run directory.
        """

    def on_step(self, step: StepSummary) -> None:
        """A step is over on all ranks."""

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        """An evaluation is over on all ranks."""

    def on_checkpoint(self, checkpoint: Saved) -> None:
        """A checkpoint is on the disk."""

    def on_failure(self, failure: FailureEvent) -> None:
        """Workers or servers were lost, and the run goes on."""

    def on_recovery(self, recovery: Recovery) -> None:
        """All are at work again after a failure."""

    def on_resize(self, resized: Resized) -> None:
        """The run goes on with another number of workers."""

    def should_stop(self) -> bool | str:
        """
        Whether the run is to end before its last step; asked after each step and evaluation.

        A train function is told when it asks `distplat.should_stop()`.

        Returns:
            True, or why: all workers end after the same step, as after the last one.
        """
        return False

    def on_end(self, result: Result, error: BaseException | None) -> None:
        """
        The run is over, and its files are written.

        Args:
            result: what there is of it.
            error: why it failed; None: it ended well.
        """


_LONG_S = 120.0
"""Seconds in one call after which a warning names the callback, once."""
_LOOK_S = 1.0

_EVENTS = {name for name in vars(Callback) if name.startswith("on_")}


def check_callbacks(callbacks: Sequence[object]) -> None:
    """
    Look at what `Trainer` was handed.

    Args:
        callbacks: as they were given.

    Raises:
        SpecError: one is no `Callback`, or has a method that would never be called.
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
        callbacks: in the order in which they are called.
        max_time_s: after which it ends; None: never.
        clock: gives seconds.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        max_time_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._active = list(callbacks)
        self._max_time_s, self._clock = max_time_s, clock
        self._began, self._stepped = clock(), False
        self.stop: str | None = None  #: why the run is to end before its last step
        self._called: tuple[Callback, float] | None = None  #: who is being called, and since when
        self._over = threading.Event()

    def ending(self) -> bool:
        """Say whether the run is to end before its last step; asked again and again."""
        limit_s = self._max_time_s
        if limit_s is not None and self._stepped and self.stop is None:
            passed = self._clock() - self._began
            self.stop = f"max_time_s: {limit_s:g} s are over" if passed >= limit_s else None
        return self.stop is not None

    def start(self, job: Job, run: str, path: Path) -> None:
        """Call `on_start` of each."""
        threading.Thread(target=self._watch_calls, name="callbacks", daemon=True).start()
        self._call_each(lambda one: one.on_start(job, run, path))

    def tell(self, summary: Summary) -> None:
        """Tell all of what happened."""
        match summary:
            case StepSummary():
                self._stepped = True
                self._call_each(lambda one: one.on_step(summary))
                self._call_each(self._ask)
            case EvalSummary():
                self._call_each(lambda one: one.on_evaluation(summary))
                self._call_each(self._ask)
            case Saved():
                self._call_each(lambda one: one.on_checkpoint(summary))
            case FailureEvent():
                self._call_each(lambda one: one.on_failure(summary))
            case Recovery():
                self._call_each(lambda one: one.on_recovery(summary))
            case Resized():
                self._call_each(lambda one: one.on_resize(summary))
            case EarlyStopReached():
                self.stop = self.stop or summary.reason

    def _ask(self, callback: Callback) -> None:
        """See whether one wants the run to end; what the first says is the reason."""
        if self.stop is None and (answer := callback.should_stop()):
            name = type(callback).__name__
            self.stop = answer if isinstance(answer, str) else f"{name}.should_stop()"

    def end(self, result: Result, error: BaseException | None) -> None:
        """Call `on_end` of each."""
        try:
            self._call_each(lambda one: one.on_end(result, error))
        finally:
            self._over.set()

    def _call_each(self, tell: Callable[[Callback], object]) -> None:
        for callback in list(self._active):
            self._called = callback, self._clock()
            try:
                tell(callback)
            except KeyboardInterrupt:  # who is at the terminal is no guest
                raise
            except BaseException as error:  # sys.exit() too: the run would end with its code
                # Not `remove`: two callbacks of a dataclass may be equal.
                self._active = [one for one in self._active if one is not callback]
                name, kind = type(callback).__name__, type(error).__name__
                text = "the callback %s raised %s: %s; the run goes on without it"
                logger.warning(text, name, kind, error)
            finally:
                self._called = None

    def _watch_calls(self) -> None:
        """Name a callback that does not return: without it the run would just seem to stand."""
        warned: list[Callback] = []
        while not self._over.wait(_LOOK_S):
            callback, since = self._called or (None, 0.0)
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
"""How long the end of a run waits for its trackers, all together."""
_CLOSE_STOPPED_S = 10.0
"""How long it waits where somebody asked for the end, and may be about to kill the process."""
_SAY_AFTER_S = 2.0
"""Seconds after which a warning says what is waited for."""


class Tracking(Callback):
    """
    The trackers of a run.

    Args:
        specs: which ones.
        before: directory of the run that this one goes on from; None: it begins anew.
    """

    def __init__(self, specs: Sequence[TrackerSpec], before: Path | None) -> None:
        self._specs, self._before = specs, before
        self._writers: dict[str, BackgroundWriter[_TrackerEvent]] = {}  #: none before the start

    @override
    def on_start(self, job: Job, run: str, path: Path) -> None:
        self._writers = {spec.name: self._writer(spec, job, path) for spec in self._specs}

    def _writer(self, spec: TrackerSpec, job: Job, path: Path) -> BackgroundWriter[_TrackerEvent]:
        """Begin: the library is imported in the thread, for that takes seconds."""
        tracker_writer = _TrackerWriter(partial(open_tracker, spec, job, path, self._before))
        warn = partial(logger.warning, "%s: %s", spec.name)
        return BackgroundWriter(tracker_writer, warn, where="its server")

    @override
    def on_step(self, step: StepSummary) -> None:
        self._tell(step)

    @override
    def on_evaluation(self, evaluation: EvalSummary) -> None:
        self._tell(evaluation)

    @override
    def on_end(self, result: Result, error: BaseException | None) -> None:
        """Show that the run is over, and wait within reason."""
        self._tell(error is not None)
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        limit_s = _CLOSE_STOPPED_S if stopped else _CLOSE_S
        until = time.monotonic() + limit_s
        if late := [
            name for name, writer in self._writers.items() if not writer.wait(_SAY_AFTER_S)
        ]:
            text = "the run is over; its last figures are on their way to %s, %.0f s at most"
            logger.warning(text, ", ".join(late), max(0.0, until - time.monotonic()))
        for writer in self._writers.values():
            writer.close(max(0.0, until - time.monotonic()))

    def _tell(self, event: _TrackerEvent) -> None:
        for writer in self._writers.values():
            writer.put(event)


_TrackerEvent: TypeAlias = StepSummary | EvalSummary | bool
"""A flag says that the run is over, and whether it failed."""


class _TrackerWriter:
    """
    Shows in one tracker what it is called with.

    Args:
        begin: opens the tracker, at the first call.
    """

    def __init__(self, begin: Callable[[], Tracker]) -> None:
        self._open = begin
        self._tracker: Tracker | None = None
        self._error: BaseException | None = None  #: why it could not be opened

    def __call__(self, event: _TrackerEvent) -> None:
        if self._error is not None:
            raise self._error
        if self._tracker is None:
            try:
                self._tracker = self._open()
            except BaseException as error:  # once: it may take long, or ask for a password
                self._error = error
                raise
        if isinstance(event, bool):
            self._tracker.close(event)
        else:
            self._tracker.write(event.step, points_of(event))
