"""What a rank of a run that is made again has to do; see `replay.py`."""

from collections.abc import Callable, Sequence

from distplat.platform.task_scheduler import TaskPlan, Work


class ReplayLeases:
    """What one rank made, one task after the other (see `Leases`)."""

    def __init__(self, tasks: Sequence[int]) -> None:
        self._tasks, self._given = tasks, 0

    def connect(self, course: TaskPlan) -> None:
        """See `Leases`."""

    def next(self, alive: Callable[[], None]) -> Work:
        """See `Leases`."""
        number, self._given = self._given, self._given + 1
        if number == len(self._tasks):
            return Work(number, trained=True, over=True)
        return Work(number, range(self._tasks[number], self._tasks[number] + 1))

    def finish(self, tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()) -> None:
        """See `Leases`."""
