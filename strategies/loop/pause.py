"""
Checked before each step: the worker waits, continues or stops.

The training thread calls `before`; the threads that answer the controller call the rest.
`platform/quiesce.py` decides.
"""

import threading

from distplat.platform.errors import Abandoned, DeadlineExceeded
from distplat.platform.quiesce import Next, Resting


class PauseGate:
    """
    The gate of one attempt.

    Args:
        limit_s: how long to wait, in seconds, for word where to stop.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._changed = threading.Condition()
        self._resting = Resting()
        self._given_up = False
        self.rested = False  #: whether the worker has stopped where all do

    def start(self, step: int) -> None:
        """The attempt begins with this step."""
        with self._changed:
            self._resting.start(step)

    def rest(self) -> None:
        """Let no further step be begun."""
        with self._changed:
            self._resting.rest()

    def rest_at(self, step: int) -> None:
        """Let all steps before this one be begun, and no other."""
        with self._changed:
            self._resting.rest_at(step)
            self._changed.notify_all()

    def end_at(self, step: int) -> None:
        """Let all steps before this one be begun; the run ends there."""
        with self._changed:
            self._resting.end_at(step)
            self._changed.notify_all()

    def give_up(self) -> None:
        """The attempt is over: send whoever comes, or waits, home."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    @property
    def asked(self) -> bool:
        """Whether `rest` was called: what a train function is told by `should_stop`."""
        with self._changed:
            return self._resting.asked

    @property
    def answer(self) -> int | None:
        """The first step that is not begun, if `rest` was called and it is known."""
        with self._changed:
            return self._resting.answer

    def before(self, step: int) -> bool:
        """
        Be about to begin a step; True once it may be begun, False: the run ends here.

        Raises:
            Abandoned: the attempt ends here.
            DeadlineExceeded: nobody said where to stop.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._next(step) is not Next.WAIT, self._limit_s)
            what = self._next(step)
        if what is Next.WAIT:
            late, setting = ("the controller",), "failure.step_timeout_s"
            raise DeadlineExceeded(f"halt before step {step + 1}", late, self._limit_s, setting)
        if what is Next.STOP:
            raise Abandoned("this worker was told to stop between two steps")
        return what is Next.BEGIN

    def _next(self, step: int) -> Next:
        if self._given_up:
            return Next.STOP
        what = self._resting.before(step)
        self.rested = what is Next.STOP
        return what
