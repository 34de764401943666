"""
The actor class of the task scheduler: leases tasks to workers and collects their heartbeats.

The class is plain; `spawn.py` makes an actor of it. Its methods are coroutines: any number of calls
may wait at once, and no two run at the same time. The decisions are made in `platform/`
(`task_scheduler.py`, `worker_stats.py`).

Workers of a synchronous run compute their parts of every step without a lease and only send
heartbeats, twice a second. With leased tasks they request half a second of work at a time.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from typing_extensions import override

from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import FencedError, ProtocolError
from distplat.platform.spec import Consistency, Job
from distplat.platform.task_scheduler import Lease, TaskPlan, TaskScheduler, lease_size
from distplat.platform.worker_stats import WorkerHeartbeat, WorkerStats, WorkerTable

HOLD_S = 1.0
"""How long a request for work waits while no task is free."""
ROOM = 16
"""Number of workers that may join after the start; the servers have threads for them."""


@dataclass(frozen=True)
class WorkerRow:
    """One worker of a run."""

    stats: WorkerStats
    lease: tuple[int, int, int] | None
    """First task, last task and number of tasks of the worker's lease; None: it has no lease."""
    leaving: bool


@dataclass(frozen=True)
class SchedulerStatus:
    """Status of a run's workers."""

    attempt: int
    dynamic_tasks: bool
    """Whether tasks are leased; if not, each worker computes its part of every step."""
    steps: int
    """Steps of the run; 0: no worker has joined yet; `UNBOUNDED`: only its time limit ends it."""
    parts: int
    """Parts of a step."""
    done: int
    """Steps completed."""
    duplicates: int
    """Tasks that were computed twice."""
    workers: tuple[WorkerRow, ...]


class Scheduler:
    """
    Task scheduler: leases tasks to workers and collects their heartbeats.

    Args:
        name: of the actor.
        job: the run's job.
        consistency: whether tasks are leased, and how far ahead.
    """

    def __init__(self, name: str, job: Job, consistency: Consistency) -> None:
        self._name, self._job, self._consistency = name, job, consistency
        self._attempt = 0
        self._workers_table, self._clock = WorkerTable(), AwakeClock()
        self._scheduler: TaskScheduler | None = None
        self._plan: TaskPlan | None = None
        self._leaving: set[int] = set()
        self._changed = asyncio.Event()  #: replaced by a new event at every change

    @override
    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    async def poll(self, number: int, hold_s: float) -> None:
        """Answer a health check of the controller; see `Worker.poll`."""
        self._clock.now()  # an `AwakeClock` stands still unless it is read
        await asyncio.sleep(hold_s)

    async def join(self, rank: int, attempt: int, plan: TaskPlan) -> None:
        """
        Register a worker; the first worker of a later attempt starts that attempt.

        Raises:
            FencedError: a later attempt has started.
            ProtocolError: this worker's data set differs from that of the other workers.
        """
        self._check(attempt)
        if attempt > self._attempt:
            self._attempt = attempt
            if self._scheduler is not None:
                self._scheduler.renew(attempt)
            else:
                self._plan = None  # the number of parts may have changed
                self._workers_table.keep_only(range(plan.parts))
        if self._plan is None:
            self._plan = plan
            if self._consistency.dynamic_tasks:
                self._scheduler = TaskScheduler(plan, self._consistency.bound)
                for leaving_rank in self._leaving:
                    self._scheduler.dismiss(leaving_rank)
        elif (plan.steps, plan.parts) != (self._plan.steps, self._plan.parts):
            raise ProtocolError(
                f"rank {rank} built another data set than the first rank to come: {plan} against "
                f"{self._plan}; train_data() must not depend on the process"
            )
        self._workers_table.begin(rank, self._clock.now())
        self._wake()

    async def work(
        self,
        rank: int,
        attempt: int,
        number: int,
        tasks: tuple[int, ...],
        evaluations: tuple[tuple[int, int], ...],
    ) -> Lease | None:
        """
        Lease tasks to a worker, waiting up to `HOLD_S`; None: no task is free, the worker retries.

        Args:
            rank: of the worker.
            attempt: the worker's.
            number: of the request; a repeated number gets the same lease.
            tasks: finished since the worker's last request.
            evaluations: finished since then.
        """
        scheduler = self._finish(rank, attempt, tasks, evaluations)
        until = time.monotonic() + HOLD_S
        while True:
            self._check(attempt)
            self._reclaim_tasks(scheduler)
            lease = scheduler.work(rank, number, self.lease_size(rank, scheduler))
            left_s = until - time.monotonic()
            if lease is not None or left_s <= 0:
                return lease
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                continue

    def lease_size(self, rank: int, scheduler: TaskScheduler) -> int:
        """Return the number of tasks of a worker's next lease."""
        workers = self._workers_table.ranks - self._leaving
        return lease_size(self._workers_table.wall_s(rank), scheduler.left, len(workers))

    async def beat(
        self,
        rank: int,
        attempt: int,
        beat: WorkerHeartbeat,
        tasks: tuple[int, ...],
        evaluations: tuple[tuple[int, int], ...],
    ) -> None:
        """Record a worker's heartbeat, and the tasks and evaluations that it has finished."""
        if attempt < self._attempt:
            return  # the worker does not know of the later attempt yet
        self._workers_table.add_heartbeat(rank, beat, self._clock.now())
        if self._scheduler is not None:
            self._finish(rank, attempt, tasks, evaluations)

    async def dismiss(self, ranks: tuple[int, ...]) -> None:
        """Lease no more tasks to these workers: they finish their leases and leave."""
        self._leaving.update(ranks)
        for rank in ranks:
            if self._scheduler is not None:
                self._scheduler.dismiss(rank)
        self._wake()

    async def end_early(self, saves: bool = False) -> None:
        """Lease no step that no worker has started; `saves`: see `TaskScheduler.end_early`."""
        if self._scheduler is not None:
            self._scheduler.end_early(saves=saves)
        self._wake()

    async def forget(self, rank: int) -> None:
        """Remove a dismissed worker that has ended."""
        self._leaving.discard(rank)
        self._workers_table.forget(rank)

    async def status(self) -> SchedulerStatus:
        """Return the status of all workers."""
        now, scheduler, plan = self._clock.now(), self._scheduler, self._plan
        rows = tuple(self._row(stats) for stats in self._workers_table.stats(now))
        furthest = max((row.stats.step for row in rows), default=0)
        return SchedulerStatus(
            self._attempt,
            self._consistency.dynamic_tasks,
            0 if plan is None else plan.steps,
            1 if plan is None else plan.parts,
            furthest if scheduler is None else scheduler.done.low // scheduler.plan.parts,
            0 if scheduler is None else scheduler.duplicates,
            rows,
        )

    def _row(self, stats: WorkerStats) -> WorkerRow:
        tasks = self._scheduler.held(stats.rank) if self._scheduler is not None else []
        lease = (tasks[0], tasks[-1], len(tasks)) if tasks else None
        return WorkerRow(stats, lease, stats.rank in self._leaving)

    def _check(self, attempt: int) -> None:
        if attempt < self._attempt:
            raise FencedError(f"attempt {attempt} refused by {self._name}: {self._attempt} began")

    def _finish(
        self,
        rank: int,
        attempt: int,
        tasks: tuple[int, ...],
        evaluations: tuple[tuple[int, int], ...],
    ) -> TaskScheduler:
        self._check(attempt)
        if self._scheduler is None:
            raise ProtocolError(f"rank {rank} has not joined {self._name}")
        if tasks or evaluations:
            self._scheduler.finish(rank, tasks, evaluations)
            self._wake()
        return self._scheduler

    def _reclaim_tasks(self, scheduler: TaskScheduler) -> None:
        """Reclaim tasks of workers without heartbeats, before the controller kills them."""
        limit = self._job.failure.heartbeat_timeout_s
        for rank in self._workers_table.silent(self._clock.now(), limit):
            scheduler.requeue(rank)

    def _wake(self) -> None:
        """Wake the workers that wait for a lease."""
        self._changed.set()
        self._changed = asyncio.Event()
