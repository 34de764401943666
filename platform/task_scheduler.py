"""
The task scheduler's state machine: leases the tasks of a run to workers.

A task is one part of one step's batch. A step has as many parts as the job has workers at its
start, regardless of the number of workers later. Tasks are leased in order, several at a time;
tasks of a lost worker are leased again, before any new task.

    step              0         1         2         3
    task            0 1 2     3 4 5     6 7 8     9 ...       three parts
    worker-0        ═ ═ ═                         ═ ...
    worker-1              ═ ═ ═     ═ ═ ═
    worker-2 (slow)                         ═ ═               fewer tasks; no other worker waits

A worker that asks receives a range of tasks, a part of an evaluation, or nothing for now. With a
bound, no task is leased that is more than `bound` steps ahead of the oldest unfinished task. No
task is leased before an evaluation of step 0 is done, because it needs the initial parameters.

The class reads no clock and does no I/O. Workers number their requests: the same number gets the
same answer, so a lost answer can be requested again.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from distplat.platform.errors import ProtocolError, StaleError
from distplat.platform.ledger import IntervalSet

LEASE_S = 0.5
"""Target work per lease: a request to the scheduler costs a thousandth of it."""
MAX_LEASE_TASKS = 256
"""Most tasks of one lease."""


@dataclass(frozen=True)
class TaskPlan:
    """The tasks and evaluations of a run; the same on all workers."""

    steps: int
    """Steps of the run."""
    parts: int
    """Tasks of a step."""
    first: int = 0
    """Steps that were done before this run."""
    evaluations: Sequence[int] = ()
    """Steps after which to evaluate, ascending; 0: before any task is leased."""

    @property
    def tasks(self) -> int:
        """Number of tasks of the run."""
        return self.steps * self.parts


@dataclass(frozen=True)
class Lease:
    """Work for one worker; `over`: no more work will follow."""

    number: int
    """Number of the request that this lease answers."""
    tasks: range = range(0)
    """Tasks, to be done in this order."""
    evaluations: tuple[tuple[int, int], ...] = ()
    """(steps, part) of each evaluation to run with the newest parameters, before the tasks."""
    reach: int = 0
    """Number of steps whose tasks are all leased."""
    trained: bool = False
    """Whether every task is done: the parameters are final."""
    steps: int = 0
    """Steps of the run, once every task is done; fewer than planned if the run ends early."""
    over: bool = False
    saves: bool = False
    """Whether a checkpoint is saved once `trained`, because the run was asked to stop."""


@dataclass
class _WorkerTasks:
    """Leased work of one worker."""

    tasks: set[int] = field(default_factory=set)
    evaluations: set[tuple[int, int]] = field(default_factory=set)
    answer: Lease | None = None


def lease_size(task_s: float | None, left: int, workers: int) -> int:
    """
    Return the number of tasks for the next lease.

    Args:
        task_s: the worker's seconds per task; None: not known yet.
        left: tasks that are not leased.
        workers: workers that share these tasks. Leases get shorter towards the end of the run, so
            that no worker waits long for the last one.
    """
    tasks_per_lease = 1 if task_s is None else int(LEASE_S / max(task_s, 1e-6))
    return max(1, min(tasks_per_lease, MAX_LEASE_TASKS, left // (2 * max(1, workers))))


class TaskScheduler:
    """
    State of one run's leases.

    Args:
        plan: the run's tasks and evaluations.
        bound: most steps that a leased task may be ahead of the oldest unfinished task; None: no
            limit.
    """

    def __init__(self, plan: TaskPlan, bound: int | None = None) -> None:
        self.plan, self._bound = plan, bound
        self.attempt = 0
        self.done = IntervalSet(plan.first * plan.parts)
        self.duplicates = 0  #: leased tasks that were already done
        self._next = self.done.low  #: first task that was never leased
        self._returned: list[int] = []  #: tasks to be leased again, ascending
        self._evaluations: list[tuple[int, int]] = []  #: to be leased, ascending
        self._due = 0  #: number of planned evaluations whose steps are done
        self._evaluated: set[tuple[int, int]] = set()
        self._holdings: dict[int, _WorkerTasks] = {}
        self._leaving: set[int] = set()
        self._saves = False

    @property
    def trained(self) -> bool:
        """Whether every task is done."""
        return self.done.low >= self.plan.tasks

    @property
    def over(self) -> bool:
        """Whether all tasks and evaluations are done."""
        total = len(self.plan.evaluations) * self.plan.parts
        return self.trained and (self._saves or len(self._evaluated) == total)

    @property
    def _has_baseline(self) -> bool:
        """Whether the evaluation before the first step is done, or not planned."""
        if 0 not in self.plan.evaluations[:1]:
            return True
        return all((0, part) in self._evaluated for part in range(self.plan.parts))

    @property
    def left(self) -> int:
        """Number of tasks that no worker holds and that are not done."""
        return self.plan.tasks - self._next + len(self._returned)

    def held(self, worker: int) -> list[int]:
        """Return a worker's leased tasks that are not done, ascending."""
        holding = self._holdings.get(worker)
        return sorted(holding.tasks) if holding is not None else []

    def renew(self, attempt: int) -> None:
        """Start a later attempt: all leased, unfinished work is leased again."""
        if attempt > self.attempt:
            self.attempt = attempt
            for worker in list(self._holdings):
                self.requeue(worker)
            self._holdings.clear()

    def requeue(self, worker: int) -> None:
        """Return a worker's leased work to the queue; the worker may still ask for more."""
        holding = self._holdings.get(worker)
        if holding is None:
            return
        for task in holding.tasks:
            if task not in self.done:
                bisect.insort(self._returned, task)
        self._evaluations = sorted(holding.evaluations) + self._evaluations
        holding.tasks.clear()
        holding.evaluations.clear()

    def dismiss(self, worker: int) -> None:
        """
        Dismiss a worker: it finishes its leases, reports them, and leaves.

        A worker asks for more work before it has finished its lease (`actors/servers/leases.py`).
        If it were told at once that no work follows, it would leave without reporting its last
        tasks.
        """
        self._leaving.add(worker)

    def end_early(self, *, saves: bool = False) -> None:
        """
        Lease no tasks of further steps; the run ends after the steps that are partly leased.

        Args:
            saves: whether the run ends with a checkpoint, and without evaluations that have not
                started.
        """
        self._saves = self._saves or saves
        plan = self.plan
        steps = max(plan.first, -(-self._next // plan.parts))
        if steps >= plan.steps:
            return
        due = tuple(takewhile(lambda evaluated: evaluated < steps, plan.evaluations))
        if plan.evaluations and (steps or plan.evaluations[0] == 0):
            due = (*due, steps)
        self.plan = replace(plan, steps=steps, evaluations=due)

    def work(self, worker: int, number: int, most: int = 1) -> Lease | None:
        """
        Answer a worker's request for work.

        Args:
            worker: its rank.
            number: of the request, from 0 in each attempt.
            most: most tasks of the lease.

        Returns:
            The lease; None: nothing for now, and the worker asks again with the same number.

        Raises:
            StaleError: a later request was already answered.
        """
        holding = self._holdings.setdefault(worker, _WorkerTasks())
        last = holding.answer
        if last is not None and number == last.number:
            return last
        if last is not None and number < last.number:
            raise StaleError(f"request {number} of rank {worker} refused: a later one was answered")
        lease = self._find_work(worker, number, most)
        if lease is not None:
            holding.answer = lease
            holding.tasks.update(lease.tasks)
            holding.evaluations.update(lease.evaluations)
        return lease

    def finish(
        self, worker: int, tasks: tuple[int, ...], evaluations: tuple[tuple[int, int], ...] = ()
    ) -> None:
        """
        Record a worker's finished work; repeated reports count once.

        Raises:
            ProtocolError: there is no such task.
        """
        holding = self._holdings.setdefault(worker, _WorkerTasks())
        for task in tasks:
            if not self.plan.first * self.plan.parts <= task < self.plan.tasks:
                raise ProtocolError(f"rank {worker} reported task {task}, which does not exist")
            is_leased = task in holding.tasks
            holding.tasks.discard(task)
            if self.done.add(task):
                if task in self._returned:
                    self._returned.remove(task)
            elif is_leased:
                self.duplicates += 1
        for evaluation in evaluations:
            holding.evaluations.discard(evaluation)
            self._evaluated.add(evaluation)
            if evaluation in self._evaluations:
                self._evaluations.remove(evaluation)

    def _find_work(self, worker: int, number: int, most: int) -> Lease | None:
        reach, trained = self._next // self.plan.parts, self.trained
        steps, holding = self.plan.steps if trained else 0, self._holdings[worker]
        if worker in self._leaving and not self.over and (holding.tasks or holding.evaluations):
            return None
        if worker in self._leaving or self.over:
            return Lease(number, range(0), (), reach, trained, steps, True, self._saves)
        self._queue_due_evaluations()
        if self._evaluations and not self._saves and self._is_turn(self._evaluations[0][0]):
            return Lease(number, range(0), (self._evaluations.pop(0),), reach, trained, steps)
        tasks = self._lease(most) if self._has_baseline else range(0)
        if not tasks:
            return None
        return Lease(number, tasks, reach=self._next // self.plan.parts)

    def _is_turn(self, steps: int) -> bool:
        """Whether no part of an earlier evaluation is running: results are reported in order."""
        holdings = self._holdings.values()
        return all(held >= steps for holding in holdings for held, _ in holding.evaluations)

    def _queue_due_evaluations(self) -> None:
        """Queue the evaluations whose steps are done."""
        planned, parts = self.plan.evaluations, range(self.plan.parts)
        while self._due < len(planned) and planned[self._due] * len(parts) <= self.done.low:
            due = [(planned[self._due], part) for part in parts]
            self._evaluations += [pair for pair in due if pair not in self._evaluated]
            self._due += 1

    def _lease(self, most: int) -> range:
        """Lease the lowest range of tasks that no worker holds, at most `most` of them."""
        if self._returned:
            first, count = self._returned[0], 1
            while count < min(most, len(self._returned)) and self._returned[count] == first + count:
                count += 1
            del self._returned[:count]
            return range(first, first + count)
        end = self.plan.tasks
        if self._bound is not None:
            oldest = self.done.low // self.plan.parts
            end = min(end, (oldest + self._bound + 1) * self.plan.parts)
        first, self._next = self._next, max(self._next, min(self._next + most, end))
        return range(first, self._next)
