"""The task scheduler in memory; `strategies/fakes.py` gives it out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from distplat.platform.errors import DeadlineExceeded, ProtocolError
from distplat.platform.task_scheduler import Course, TaskScheduler, Work


class LeaseDesk:
    """
    A scheduler that the ranks' `InMemoryLeases` share.

    Args:
        bound: see `TaskScheduler`.
        most: tasks of a lease.
        timeout_s: how long a rank waits while no task is done.
    """

    def __init__(self, bound: int | None = None, most: int = 1, timeout_s: float = 10.0) -> None:
        self._bound, self._most, self._timeout_s = bound, most, timeout_s
        self._changed = threading.Condition()
        self._ranks: set[int] = set()
        self.brain: TaskScheduler | None = None

    def connect(self, rank: int, course: Course) -> None:
        """Take a rank in; the first one says what there is to do."""
        with self._changed:
            self._ranks.add(rank)
            if self.brain is None:
                self.brain = TaskScheduler(course, self._bound)
            elif (course.steps, course.parts) != (self.brain.course.steps, self.brain.course.parts):
                raise ProtocolError(f"rank {rank} knows another course: {course}")

    def lose(self, rank: int) -> None:
        """Lease what a rank holds to others: it is lost, or was not heard of."""
        with self._changed:
            assert self.brain is not None, "somebody has connected"
            self.brain.lose(rank)
            self._changed.notify_all()

    def renew(self, attempt: int) -> None:
        """Begin a later attempt; no rank is at work."""
        with self._changed:
            assert self.brain is not None, "somebody has connected"
            self.brain.renew(attempt)

    def dismiss(self, rank: int) -> None:
        """Have a rank finish what it has, and go."""
        with self._changed:
            assert self.brain is not None, "somebody has connected"
            self.brain.dismiss(rank)
            self._changed.notify_all()

    def work(self, rank: int, number: int) -> Work:
        """Answer a rank, once there is something."""
        with self._changed:
            brain = self.brain
            assert brain is not None, "somebody has connected"
            while True:
                found = brain.work(rank, number, self._most)
                if found is not None:
                    return found
                if not self._changed.wait(self._timeout_s):
                    late = tuple(f"worker-{r}" for r in sorted(self._ranks) if brain.held(r))
                    setting = "failure.step_timeout_s"
                    raise DeadlineExceeded("the next task", late, self._timeout_s, setting)

    def finish(
        self, rank: int, tasks: Sequence[int], evaluations: Sequence[tuple[int, int]]
    ) -> None:
        """Note what is done."""
        with self._changed:
            assert self.brain is not None, "somebody has connected"
            self.brain.finish(rank, tuple(tasks), tuple(evaluations))
            self._changed.notify_all()


class InMemoryLeases:
    """One rank's view of a `LeaseDesk` (see `Leases`)."""

    def __init__(self, desk: LeaseDesk, rank: int) -> None:
        self._desk, self._rank, self._asked = desk, rank, 0

    def connect(self, course: Course) -> None:
        """See `Leases`."""
        self._desk.connect(self._rank, course)

    def next(self, alive: Callable[[], None]) -> Work:
        """See `Leases`."""
        self._asked += 1
        return self._desk.work(self._rank, self._asked - 1)

    def finish(self, tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()) -> None:
        """See `Leases`."""
        self._desk.finish(self._rank, tasks, evaluations)
