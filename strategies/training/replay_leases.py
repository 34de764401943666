"""What a rank of a run that is made again has to do; see `replay.py`."""

from collections.abc import Callable, Sequence

from distplat.platform.task_scheduler import Lease, TaskPlan


class ReplayLeases:
    """What one rank made, one task after the other (see `Leases`)."""

    def __init__(self, tasks: Sequence[int]) -> None:
        self._tasks, self._given = tasks, 0

    def connect(self, plan: TaskPlan) -> None:
        """See `Leases`."""

    def next(self, alive: Callable[[], None]) -> Lease:
        """See `Leases`."""
        number, self._given = self._given, self._given + 1
        if number == len(self._tasks):
            return Lease(number, trained=True, over=True)
        return Lease(number, range(self._tasks[number], self._tasks[number] + 1))

    def finish(self, tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()) -> None:
        """See `Leases`."""
