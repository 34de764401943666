"""
What Ray sees of the task scheduler: leases work to the workers, and knows how each one is doing.

The class is plain; `spawn.py` makes an actor of it. Its methods are coroutines, so any number of
questions may be open, and no two of them run at once: what decides is in `platform/`
(`task_scheduler.py`, `worker_stats.py`).

Workers of a synchronous run make their parts of every step without asking, and tell twice a second
how they are doing; where tasks are leased they ask for half a second of work at a time.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import FencedError, ProtocolError
from distplat.platform.spec import Consistency, Job
from distplat.platform.task_scheduler import Lease, TaskPlan, TaskScheduler, lease_size
from distplat.platform.worker_stats import WorkerHeartbeat, WorkerStats, WorkerTable

HOLD_S = 1.0
"""How long a question for work is kept while there is none."""
ROOM = 16
"""Number of workers that may join beyond those at the start; the servers have threads for them."""


@dataclass(frozen=True)
class WorkerRow:
    """One worker of a run."""

    stats: WorkerStats
    lease: tuple[int, int, int] | None
    """First task, last task and number of tasks that it holds; None: it holds nothing."""
    leaving: bool


@dataclass(frozen=True)
class SchedulerStatus:
    """How the workers of a run are doing."""

    attempt: int
    dynamic_tasks: bool
    """Whether tasks are leased; else each worker makes its part of every step."""
    steps: int
    """Steps of the run; 0: no worker has joined yet, `UNBOUNDED`: its time alone ends it."""
    parts: int
    """Parts of a step."""
    done: int
    """Steps that are made."""
    duplicates: int
    """Tasks that were made twice."""
    workers: tuple[WorkerRow, ...]


class Scheduler:
    """
    The task scheduler: leases tasks to workers, and collects their heartbeats.

    Args:
        name: of the actor.
        job: the run's job.
        consistency: whether tasks are leased, and how far ahead.
    """

    def __init__(self, name: str, job: Job, consistency: Consistency) -> None:
        self._name, self._job, self._how = name, job, consistency
        self._attempt = 0
        self._workers_table, self._clock = WorkerTable(), AwakeClock()
        self._scheduler: TaskScheduler | None = None
        self._plan: TaskPlan | None = None
        self._leaving: set[int] = set()
        self._changed = asyncio.Event()  #: replaced by a new one whenever something is done

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    async def poll(self, number: int, hold_s: float) -> None:
        """Let the controller see that this process lives; see `Worker.poll`."""
        self._clock.now()  # it stands still while nobody reads it
        await asyncio.sleep(hold_s)

    async def join(self, rank: int, attempt: int, plan: TaskPlan) -> None:
        """
        Take a worker in; the first of a later attempt begins it.

        Raises:
            FencedError: a later attempt has begun.
            ProtocolError: this worker's data set is not that of the others.
        """
        self._check(attempt)
        if attempt > self._attempt:
            self._attempt = attempt
            if self._scheduler is not None:
                self._scheduler.renew(attempt)
            else:
                self._plan = None  # there may be more or fewer parts now
                self._workers_table.keep(range(plan.parts))
        if self._plan is None:
            self._plan = plan
            if self._how.dynamic_tasks:
                self._scheduler = TaskScheduler(plan, self._how.bound)
                for leaving in self._leaving:
                    self._scheduler.dismiss(leaving)
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
        Lease work, when there is some; None: not yet, ask again.

        Args:
            rank: who asks.
            attempt: its generation.
            number: of the question; the same number gets the same answer.
            tasks: that it has done since.
            evaluations: the same.
        """
        scheduler = self._finish(rank, attempt, tasks, evaluations)
        until = time.monotonic() + HOLD_S
        while True:
            self._check(attempt)
            self._take_from_the_silent(scheduler)
            lease = scheduler.work(rank, number, self.lease_size(rank, scheduler))
            left_s = until - time.monotonic()
            if lease is not None or left_s <= 0:
                return lease
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                continue

    def lease_size(self, rank: int, scheduler: TaskScheduler) -> int:
        """Give how many tasks a worker is leased at once."""
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
        """Hear how a worker is doing, and what it has done."""
        if attempt < self._attempt:
            return  # it does not know yet
        self._workers_table.heard(rank, beat, self._clock.now())
        if self._scheduler is not None:
            self._finish(rank, attempt, tasks, evaluations)

    async def dismiss(self, ranks: tuple[int, ...]) -> None:
        """Have workers finish what they have, and go."""
        self._leaving.update(ranks)
        for rank in ranks:
            if self._scheduler is not None:
                self._scheduler.dismiss(rank)
        self._wake()

    async def end_early(self, saves: bool = False) -> None:
        """Lease no step that nobody has begun; `saves`: see `TaskScheduler.end_early`."""
        if self._scheduler is not None:
            self._scheduler.end_early(saves=saves)
        self._wake()

    async def forget(self, rank: int) -> None:
        """A worker that was dismissed has ended."""
        self._leaving.discard(rank)
        self._workers_table.forget(rank)

    async def status(self) -> SchedulerStatus:
        """Tell how all are doing."""
        now, scheduler, plan = self._clock.now(), self._scheduler, self._plan
        entries = tuple(self._entry(stats) for stats in self._workers_table.stats(now))
        furthest = max((entry.stats.step for entry in entries), default=0)
        return SchedulerStatus(
            self._attempt,
            self._how.dynamic_tasks,
            0 if plan is None else plan.steps,
            1 if plan is None else plan.parts,
            furthest if scheduler is None else scheduler.done.low // scheduler.plan.parts,
            0 if scheduler is None else scheduler.duplicates,
            entries,
        )

    def _entry(self, stats: WorkerStats) -> WorkerRow:
        held = self._scheduler.held(stats.rank) if self._scheduler is not None else []
        lease = (held[0], held[-1], len(held)) if held else None
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

    def _take_from_the_silent(self, scheduler: TaskScheduler) -> None:
        """Lease again what workers hold that do not answer, before the controller ends them."""
        limit = self._job.failure.heartbeat_timeout_s
        for rank in self._workers_table.silent(self._clock.now(), limit):
            scheduler.lose(rank)

    def _wake(self) -> None:
        """Wake the workers that wait for a lease."""
        self._changed.set()
        self._changed = asyncio.Event()
