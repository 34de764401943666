"""
Who makes which part of a run: the task scheduler's state machine.

A task is one part of one step's batch; there are as many parts as the job has workers at its start,
whoever makes them and however many workers there are later. Tasks are leased in order, a run of
them at a time; what a lost worker held is leased again, before anything new.

    step              0         1         2         3
    task            0 1 2     3 4 5     6 7 8     9 ...       three parts
    worker-0        ═ ═ ═                         ═ ...
    worker-1              ═ ═ ═     ═ ═ ═
    worker-2 (slow)                         ═ ═               fewer tasks, and nobody waits for it

A worker that asks is given a run of tasks, or a part of an evaluation, or nothing for now. With a
bound, no task is leased that is more than so many steps ahead of the oldest one that is not done.
Before an evaluation of step 0 is done no task is leased: its parameters are the initial ones.

The class reads no clock and talks to nobody. A worker numbers its questions: the same number gets
the same answer, so that an answer that was lost on its way costs nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from distplat.platform.errors import ProtocolError, StaleError
from distplat.platform.ledger import IntervalSet

LEASE_S = 0.5
"""A lease is about so much work: a question to the scheduler costs a thousandth of it."""
MAX_LEASE_TASKS = 256
"""The most tasks of one lease."""


@dataclass(frozen=True)
class TaskPlan:
    """What there is to do in a run; the same on all workers."""

    steps: int
    """Steps of the run."""
    parts: int
    """Tasks of a step."""
    first: int = 0
    """Steps that were made before."""
    evaluations: Sequence[int] = ()
    """After how many steps there is one, ascending; 0: before any task is leased."""

    @property
    def tasks(self) -> int:
        """Tasks of the run."""
        return self.steps * self.parts


@dataclass(frozen=True)
class Lease:
    """What a worker is given; `over` says that nothing more will come."""

    number: int
    """Number of the question that it answers."""
    tasks: range = range(0)
    """Tasks, to be made in this order."""
    evaluations: tuple[tuple[int, int], ...] = ()
    """(Steps, part): to be evaluated with the newest parameters, before the tasks."""
    reach: int = 0
    """Steps all of whose tasks have been leased."""
    trained: bool = False
    """Every task is done: the parameters are the final ones."""
    steps: int = 0
    """Steps of the run, once every task is done: fewer than planned where it ends early."""
    over: bool = False
    saves: bool = False
    """The run was asked to stop: once `trained`, a checkpoint is taken."""


@dataclass
class _WorkerTasks:
    """What one worker has."""

    tasks: set[int] = field(default_factory=set)
    evaluations: set[tuple[int, int]] = field(default_factory=set)
    answer: Lease | None = None


def lease_size(task_s: float | None, left: int, workers: int) -> int:
    """
    Give how many tasks the next lease may have.

    Args:
        task_s: what a task takes this worker, in seconds; None: not known yet.
        left: tasks that are not leased.
        workers: that share them: towards the end leases get short, or all would wait for the last.
    """
    wanted = 1 if task_s is None else int(LEASE_S / max(task_s, 1e-6))
    return max(1, min(wanted, MAX_LEASE_TASKS, left // (2 * max(1, workers))))


class TaskScheduler:
    """
    Leases of one run.

    Args:
        plan: what there is to do.
        bound: steps that a lease may be ahead of the oldest task that is not done; None: any.
    """

    def __init__(self, plan: TaskPlan, bound: int | None = None) -> None:
        self.plan, self._bound = plan, bound
        self.attempt = 0
        self.done = IntervalSet(plan.first * plan.parts)
        self.duplicates = 0  #: tasks that were made once more, for nothing
        self._next = self.done.low  #: everything from here on was never leased
        self._again: list[int] = []  #: tasks to be leased once more, ascending
        self._evaluations: list[tuple[int, int]] = []  #: to be leased, ascending
        self._due = 0  #: evaluations of the plan whose steps are done
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
        """Whether everything is done."""
        every = len(self.plan.evaluations) * self.plan.parts
        return self.trained and (self._saves or len(self._evaluated) == every)

    @property
    def _has_baseline(self) -> bool:
        """Whether the evaluation before the first step is done, if there is to be one."""
        if 0 not in self.plan.evaluations[:1]:
            return True
        return all((0, part) in self._evaluated for part in range(self.plan.parts))

    @property
    def left(self) -> int:
        """Tasks that no worker holds."""
        return self.plan.tasks - self._next + len(self._again)

    def held(self, worker: int) -> list[int]:
        """Give the tasks that a worker has been given and has not yet done, ascending."""
        holding = self._holdings.get(worker)
        return sorted(holding.tasks) if holding is not None else []

    def renew(self, attempt: int) -> None:
        """Begin a later attempt: whatever anybody held is to be leased once more."""
        if attempt > self.attempt:
            self.attempt = attempt
            for worker in list(self._holdings):
                self.lose(worker)
            self._holdings.clear()

    def lose(self, worker: int) -> None:
        """Have all that a worker holds leased to others; should it come back, it gets more."""
        holding = self._holdings.get(worker)
        if holding is None:
            return
        for task in holding.tasks:
            if task not in self.done:
                bisect.insort(self._again, task)
        self._evaluations = sorted(holding.evaluations) + self._evaluations
        holding.tasks.clear()
        holding.evaluations.clear()

    def dismiss(self, worker: int) -> None:
        """
        Give a worker nothing more: it finishes what it has, tells so, and goes.

        It asks for more before it has finished (`actors/servers/leases.py`). Were it told at once
        that nothing more will come, it would go, and nobody would hear of its last tasks.
        """
        self._leaving.add(worker)

    def end_early(self, *, saves: bool = False) -> None:
        """
        Lease no step of which no task was leased; the run ends after the others.

        Args:
            saves: it ends with a checkpoint, and without the evaluations that are not begun.
        """
        self._saves = self._saves or saves
        plan = self.plan
        steps = max(plan.first, -(-self._next // plan.parts))
        if steps >= plan.steps:
            return
        due = tuple(takewhile(lambda one: one < steps, plan.evaluations))
        if plan.evaluations and (steps or plan.evaluations[0] == 0):
            due = (*due, steps)
        self.plan = replace(plan, steps=steps, evaluations=due)

    def work(self, worker: int, number: int, most: int = 1) -> Lease | None:
        """
        Answer a worker's question for work.

        Args:
            worker: its rank.
            number: of the question, from 0 in each attempt.
            most: tasks that it may be given.

        Returns:
            None: nothing for now; it asks again, with the same number.

        Raises:
            StaleError: it has had the answer to a later question.
        """
        holding = self._holdings.setdefault(worker, _WorkerTasks())
        last = holding.answer
        if last is not None and number == last.number:
            return last
        if last is not None and number < last.number:
            raise StaleError(f"question {number} of rank {worker} refused: it has gone on since")
        found = self._find(worker, number, most)
        if found is not None:
            holding.answer = found
            holding.tasks.update(found.tasks)
            holding.evaluations.update(found.evaluations)
        return found

    def finish(
        self, worker: int, tasks: tuple[int, ...], evaluations: tuple[tuple[int, int], ...] = ()
    ) -> None:
        """
        Take what a worker has done; what it tells twice counts once.

        Raises:
            ProtocolError: there is no such task.
        """
        holding = self._holdings.setdefault(worker, _WorkerTasks())
        for task in tasks:
            if not self.plan.first * self.plan.parts <= task < self.plan.tasks:
                raise ProtocolError(f"rank {worker} made task {task}: there is none of that number")
            is_leased = task in holding.tasks
            holding.tasks.discard(task)
            if self.done.add(task):
                if task in self._again:
                    self._again.remove(task)
            elif is_leased:
                self.duplicates += 1
        for evaluation in evaluations:
            holding.evaluations.discard(evaluation)
            self._evaluated.add(evaluation)
            if evaluation in self._evaluations:
                self._evaluations.remove(evaluation)

    def _find(self, worker: int, number: int, most: int) -> Lease | None:
        reach, trained = self._next // self.plan.parts, self.trained
        steps, holding = self.plan.steps if trained else 0, self._holdings[worker]
        if worker in self._leaving and not self.over and (holding.tasks or holding.evaluations):
            return None
        if worker in self._leaving or self.over:
            return Lease(number, range(0), (), reach, trained, steps, True, self._saves)
        self._note_due()
        if self._evaluations and not self._saves and self._is_turn(self._evaluations[0][0]):
            evaluation = self._evaluations.pop(0)
            evaluations = (evaluation,)
            return Lease(number, range(0), evaluations, reach, trained, steps)
        tasks = self._lease(most) if self._has_baseline else range(0)
        if not tasks:
            return None
        return Lease(number, tasks, reach=self._next // self.plan.parts)

    def _is_turn(self, steps: int) -> bool:
        """Whether no part of an earlier evaluation is under way: they are told in their order."""
        holdings = self._holdings.values()
        return all(held >= steps for holding in holdings for held, _ in holding.evaluations)

    def _note_due(self) -> None:
        """Have those evaluations leased whose steps are done."""
        planned, parts = self.plan.evaluations, range(self.plan.parts)
        while self._due < len(planned) and planned[self._due] * len(parts) <= self.done.low:
            found = [(planned[self._due], part) for part in parts]
            self._evaluations += [one for one in found if one not in self._evaluated]
            self._due += 1

    def _lease(self, most: int) -> range:
        """Take the lowest run of tasks that no worker holds, at most `most` of them."""
        if self._again:
            first, count = self._again[0], 1
            while count < min(most, len(self._again)) and self._again[count] == first + count:
                count += 1
            del self._again[:count]
            return range(first, first + count)
        end = self.plan.tasks
        if self._bound is not None:
            oldest = self.done.low // self.plan.parts
            end = min(end, (oldest + self._bound + 1) * self.plan.parts)
        first, self._next = self._next, max(self._next, min(self._next + most, end))
        return range(first, self._next)
