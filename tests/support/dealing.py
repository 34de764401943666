"""A task scheduler with leases of a fixed size, to which tests can report lost ranks."""

from functools import partial

from local_servers import LocalTaskScheduler

from distplat.actors.servers.scheduler import Scheduler
from distplat.platform.spec import Consistency, Job
from distplat.platform.task_scheduler import TaskScheduler
from distplat.strategies.strategy_spec import Roles


class FixedLeaseScheduler(Scheduler):
    """
    See `Scheduler`.

    Args:
        lease_size: number of tasks per lease.
        name: name of the actor.
        job: the run's job.
        consistency: how far ahead tasks are leased.
    """

    def __init__(self, lease_size: int, name: str, job: Job, consistency: Consistency) -> None:
        super().__init__(name, job, consistency)
        self._lease_size = lease_size
        self._dead: set[tuple[int, int]] = set()  #: (rank, attempt)

    def lease_size(self, rank: int, scheduler: TaskScheduler) -> int:
        """Return the fixed size, independent of the worker's speed."""
        return self._lease_size

    async def lose(self, rank: int) -> None:
        """Reclaim a rank's tasks, as after a heartbeat timeout."""
        assert self._scheduler is not None, "a worker has joined"
        self._scheduler.requeue(rank)
        self._wake()

    async def die(self, rank: int) -> None:
        """
        Treat a rank as dead in this attempt.

        Tasks granted to a request in flight are reclaimed, too.
        """
        self._dead.add((rank, self._attempt))
        self._wake()

    def _reclaim_tasks(self, scheduler: TaskScheduler) -> None:
        super()._reclaim_tasks(scheduler)
        for rank, attempt in self._dead:
            if attempt == self._attempt:
                scheduler.requeue(rank)


def make_task_scheduler(job: Job, roles: Roles, lease_size: int = 1) -> LocalTaskScheduler:
    """Create a run's scheduler, with leases of at lease_size `lease_size` tasks."""
    return LocalTaskScheduler(job, roles, make=partial(FixedLeaseScheduler, lease_size))
