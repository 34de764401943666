"""A task scheduler whose leases are as long as a test wants, and that can be told of losses."""

from functools import partial

from local_servers import LocalTaskScheduler

from distplat.actors.servers.scheduler import Scheduler
from distplat.platform.spec import Consistency, Job
from distplat.platform.task_scheduler import TaskScheduler
from distplat.strategies.strategy_spec import Roles


class Dealing(Scheduler):
    """
    See `Scheduler`.

    Args:
        most: tasks of a lease.
        name: of the actor.
        job: the run's job.
        consistency: how far ahead tasks are leased.
    """

    def __init__(self, most: int, name: str, job: Job, consistency: Consistency) -> None:
        super().__init__(name, job, consistency)
        self._most = most
        self._dead: set[tuple[int, int]] = set()  #: (rank, attempt)

    def lease_size(self, rank: int, scheduler: TaskScheduler) -> int:
        """See `Scheduler`; however fast the worker is."""
        return self._most

    async def lose(self, rank: int) -> None:
        """Lease what a rank holds to others, as if it had not been heard of for long."""
        assert self._scheduler is not None, "somebody has joined"
        self._scheduler.requeue(rank)
        self._wake()

    async def die(self, rank: int) -> None:
        """
        Hear no more of a rank in this attempt.

        A question of it may be on its way still, and be given work: that is taken back as well.
        """
        self._dead.add((rank, self._attempt))
        self._wake()

    def _reclaim_tasks(self, scheduler: TaskScheduler) -> None:
        super()._reclaim_tasks(scheduler)
        for rank, attempt in self._dead:
            if attempt == self._attempt:
                scheduler.requeue(rank)


def desk_of(job: Job, roles: Roles, most: int = 1) -> LocalTaskScheduler:
    """Make a run's scheduler, with leases of at most so many tasks."""
    return LocalTaskScheduler(job, roles, make=partial(Dealing, most))
