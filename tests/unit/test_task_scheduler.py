"""TaskScheduler: every task is leased in order and trained once, also if workers are lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distplat.platform.errors import FencedError, ProtocolError, StaleError
from distplat.platform.ledger import IntervalSet, PushId, StepLedger, Verdict
from distplat.platform.sampler import Sampler
from distplat.platform.task_scheduler import (
    MAX_LEASE_TASKS,
    Lease,
    TaskPlan,
    TaskScheduler,
    lease_size,
)


def tasks(work: Lease | None) -> list[int]:
    return [] if work is None else list(work.tasks)


def test_tasks_are_leased_in_order() -> None:
    scheduler = TaskScheduler(TaskPlan(steps=3, parts=2))
    assert tasks(scheduler.work(0, 0, 2)) == [0, 1]
    assert tasks(scheduler.work(7, 0, 1)) == [2]
    assert tasks(scheduler.work(0, 1, 2)) == [3, 4]
    assert (scheduler.held(0), scheduler.held(7), scheduler.left) == ([0, 1, 3, 4], [2], 1)
    assert tasks(scheduler.work(7, 1, 5)) == [5]
    assert scheduler.work(7, 2) is None, (
        "all are leased: the worker waits because other workers may be lost"
    )
    scheduler.finish(7, (2, 5))
    scheduler.finish(0, (0, 1, 3))
    assert scheduler.work(7, 2) is None
    scheduler.finish(0, (4,))
    last = scheduler.work(7, 2)
    assert last is not None and (last.trained, last.over) == (True, True)


def test_repeated_request_returns_the_same_lease() -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2))
    first = scheduler.work(0, 0, 3)
    assert scheduler.work(0, 0, 3) is first
    assert tasks(scheduler.work(0, 1, 3)) == [3, 4, 5]
    with pytest.raises(StaleError, match="request 0 of rank 0"):
        scheduler.work(0, 0, 3)


def test_tasks_of_a_lost_worker_are_leased_first() -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2))
    scheduler.work(0, 0, 4)
    scheduler.work(1, 0, 1)
    scheduler.finish(0, (0, 2))
    scheduler.requeue(0)
    scheduler.requeue(0)
    assert scheduler.held(0) == []
    assert tasks(scheduler.work(1, 1, 4)) == [1], "a lease is a consecutive range"
    assert tasks(scheduler.work(1, 2, 4)) == [3]
    assert tasks(scheduler.work(1, 3, 4)) == [5, 6, 7, 8]


def test_report_of_a_slow_worker_counts_duplicates() -> None:
    scheduler = TaskScheduler(TaskPlan(3, 1))
    scheduler.work(0, 0, 2)
    scheduler.requeue(0)
    assert tasks(scheduler.work(1, 0, 1)) == [0]
    scheduler.finish(0, (0, 1))  # the frozen worker resumes
    scheduler.finish(1, (0,))
    assert (scheduler.duplicates, scheduler.done.low) == (1, 2)
    assert tasks(scheduler.work(1, 1, 1)) == [2], "task 1 is done"


def test_done_tasks_of_a_lost_worker_are_not_leased_again() -> None:
    scheduler = TaskScheduler(TaskPlan(3, 1))
    scheduler.work(0, 0, 2)
    scheduler.requeue(0)
    assert tasks(scheduler.work(1, 0, 2)) == [0, 1]
    scheduler.finish(0, (0,))  # the frozen worker resumes
    scheduler.requeue(1)
    assert scheduler.left == 2
    assert tasks(scheduler.work(2, 0, 9)) == [1]


def test_repeated_report_counts_once() -> None:
    scheduler = TaskScheduler(TaskPlan(2, 1))
    scheduler.work(0, 0, 2)
    scheduler.finish(0, (0,))
    scheduler.finish(0, (0, 1))
    assert (scheduler.duplicates, scheduler.trained) == (0, True)


@pytest.mark.parametrize("task", [-1, 1, 6])
def test_report_of_an_unknown_task_is_rejected(task: int) -> None:
    with pytest.raises(ProtocolError, match=f"reported task {task}"):
        TaskScheduler(TaskPlan(3, 2, first=1)).finish(0, (task,))


def test_new_attempt_leases_the_tasks_that_are_not_done() -> None:
    scheduler = TaskScheduler(TaskPlan(4, 1, evaluations=(4,)))
    for worker in range(3):
        scheduler.work(worker, 0)
    scheduler.finish(1, (1,))
    scheduler.renew(1)
    assert [tasks(scheduler.work(1, number)) for number in range(3)] == [[0], [2], [3]]
    scheduler.renew(1)  # each rank of the attempt calls it
    assert scheduler.held(1) == [0, 2, 3]


@pytest.mark.parametrize(("bound", "allowed"), [(0, 2), (1, 4), (3, 8), (None, 20)])
def test_leases_stay_within_the_staleness_bound(bound: int | None, allowed: int) -> None:
    scheduler = TaskScheduler(TaskPlan(10, 2), bound)
    assert tasks(scheduler.work(0, 0, 99)) == list(range(allowed))
    if bound is not None:
        assert scheduler.work(1, 0, 99) is None
        scheduler.finish(0, tuple(range(1, allowed)))
        assert scheduler.work(1, 0, 99) is None, "the oldest task is not done"
        scheduler.finish(0, (0,))
        assert tasks(scheduler.work(1, 0, 99)) == list(range(allowed, min(20, 2 * allowed)))


def test_evaluations_are_leased_in_order() -> None:
    scheduler = TaskScheduler(TaskPlan(2, 1, evaluations=(1, 2)))
    assert tasks(scheduler.work(0, 0, 1)) == [0]
    scheduler.finish(0, (0,))
    slow = scheduler.work(0, 1)
    assert slow is not None and slow.evaluations == ((1, 0),)
    assert tasks(scheduler.work(1, 0, 1)) == [1]
    scheduler.finish(1, (1,))
    assert scheduler.work(1, 1) is None, "the previous evaluation is not done"
    scheduler.finish(0, (), ((1, 0),))
    last = scheduler.work(1, 1)
    assert last is not None and last.evaluations == ((2, 0),)


def test_evaluation_parts_are_leased_after_their_steps() -> None:
    scheduler = TaskScheduler(TaskPlan(2, 2, evaluations=(1, 2)))
    assert tasks(scheduler.work(0, 0, 2)) == [0, 1]
    assert tasks(scheduler.work(1, 0, 1)) == [2]
    scheduler.finish(0, (0, 1))
    lease = scheduler.work(0, 1, 2)
    assert lease is not None and (lease.evaluations, lease.tasks) == (((1, 0),), range(0))
    scheduler.requeue(0)
    parts = [scheduler.work(1, number, 2) for number in (1, 2)]
    assert [part.evaluations for part in parts if part] == [((1, 0),), ((1, 1),)]
    scheduler.finish(1, (2,), ((1, 0), (1, 1)))
    assert tasks(scheduler.work(1, 3, 2)) == [3]
    assert scheduler.work(0, 2) is None
    scheduler.finish(1, (3,))
    last = [scheduler.work(0, 2), scheduler.work(1, 4)]
    assert [(w.evaluations, w.trained, w.over) for w in last if w] == [
        (((2, 0),), True, False),
        (((2, 1),), True, False),
    ]
    scheduler.finish(0, (), ((2, 0),))
    assert scheduler.work(0, 3) is None, "the other part is not done"
    scheduler.finish(1, (), ((2, 1),))
    ends = [scheduler.work(0, 3), scheduler.work(1, 5)]
    assert [work.over for work in ends if work] == [True, True]


def test_tasks_wait_for_the_evaluation_of_step_0() -> None:
    scheduler = TaskScheduler(TaskPlan(2, 2, evaluations=(0, 2)))
    first = scheduler.work(0, 0, 9)
    assert first is not None and (first.evaluations, first.tasks) == (((0, 0),), range(0))
    second = scheduler.work(1, 0, 9)
    assert second is not None and second.evaluations == ((0, 1),)
    scheduler.finish(0, (), ((0, 0),))
    assert scheduler.work(0, 1, 9) is None, "the other part is not done"
    scheduler.requeue(1)
    repeated = scheduler.work(0, 1, 9)
    assert repeated is not None and repeated.evaluations == ((0, 1),)
    assert scheduler.work(1, 1, 9) is None
    scheduler.finish(0, (), ((0, 1),))
    assert tasks(scheduler.work(1, 1, 9)) == [0, 1, 2, 3]
    scheduler.requeue(1)
    scheduler.renew(1)
    assert tasks(scheduler.work(0, 0, 9)) == [0, 1, 2, 3], "the evaluation is not repeated"


@pytest.mark.parametrize("evaluated", [0, 1, 2])
def test_early_end_before_the_first_task_evaluates_once(evaluated: int) -> None:
    scheduler, number = TaskScheduler(TaskPlan(2, 2, evaluations=(0, 2))), 0
    for number in range(evaluated):
        lease = scheduler.work(0, number, 9)
        assert lease is not None
        scheduler.finish(0, (), lease.evaluations)
    scheduler.end_early()
    leased = evaluated
    while (lease := scheduler.work(0, number + 1, 9)) and not lease.over:
        leased, number = leased + len(lease.evaluations), number + 1
        scheduler.finish(0, (), lease.evaluations)
    assert lease is not None and (lease.steps, leased) == (0, 2)


def test_dismissed_worker_gets_no_lease() -> None:
    scheduler = TaskScheduler(TaskPlan(4, 1))
    scheduler.work(0, 0)
    scheduler.dismiss(0)
    assert scheduler.work(0, 1) is None, "the worker has not reported its last task"
    scheduler.finish(0, (0,))
    lease = scheduler.work(0, 1)
    assert lease is not None and (lease.over, lease.trained) == (True, False)
    assert [tasks(scheduler.work(1, number)) for number in range(3)] == [[1], [2], [3]]


def test_requeue_releases_the_tasks_of_a_dismissed_worker() -> None:
    scheduler = TaskScheduler(TaskPlan(4, 1), bound=0)
    scheduler.work(0, 0)
    scheduler.dismiss(0)
    scheduler.requeue(0)
    lease = scheduler.work(0, 1)
    assert lease is not None and lease.over
    assert tasks(scheduler.work(1, 0)) == [0]


def test_worker_dismissed_at_the_end_ends() -> None:
    scheduler = TaskScheduler(TaskPlan(1, 1, evaluations=(1,)))
    scheduler.work(0, 0)
    scheduler.dismiss(0)
    scheduler.finish(1, (0,))  # another worker has trained it
    scheduler.finish(1, (), ((1, 0),))
    lease = scheduler.work(0, 1)
    assert lease is not None and (lease.over, lease.trained) == (True, True)


@pytest.mark.parametrize(
    ("task_s", "left", "workers", "size"),
    [
        (None, 1000, 2, 1),
        (0.1, 1000, 2, 5),
        (2.0, 1000, 2, 1),
        (1e-9, 10**6, 2, MAX_LEASE_TASKS),
        (0.001, 40, 4, 5),
        (0.001, 3, 4, 1),
        (0.001, 0, 0, 1),
    ],
)
def test_lease_size(task_s: float | None, left: int, workers: int, size: int) -> None:
    assert lease_size(task_s, left, workers) == size


def test_interval_set() -> None:
    intervals = IntervalSet(3)
    assert [intervals.add(number) for number in (2, 5, 3, 5, 4, 7)] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert (intervals.low, intervals.above) == (6, {7})
    assert [number in intervals for number in (0, 5, 6, 7)] == [True, True, False, True]


class AsynchronousRuns(RuleBasedStateMachine):
    """
    Workers that join, get lost, freeze and resume; repeated calls; new attempts.

    The model is a shard that applies the first gradient of each task. At the end every sample of
    every epoch is in exactly one applied task.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Sampler(size=11, batch=4, world=3, seed=1)
        self.plan = TaskPlan(2 * self.sampler.steps_per_epoch, 3, evaluations=(2, 6))
        self.bound = 2
        self.scheduler = TaskScheduler(self.plan, self.bound)
        self.next_rank = 0
        self.tasks: dict[int, list[int]] = {}
        self.evaluations: dict[int, list[tuple[int, int]]] = {}
        self.requests: dict[int, int] = {}
        self.frozen: dict[int, list[int]] = {}
        self.applied: list[int] = []
        self.evaluated: set[tuple[int, int]] = set()

    def workers(self) -> st.SearchStrategy[int]:
        return st.sampled_from(sorted(self.tasks))

    @rule()
    def join(self) -> None:
        if len(self.tasks) < 4:
            rank = self.next_rank
            self.tasks[rank], self.evaluations[rank], self.requests[rank] = [], [], 0
            self.next_rank += 1

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), max_tasks=st.integers(1, 5), is_repeated=st.booleans())
    def request(self, data: st.DataObject, max_tasks: int, is_repeated: bool) -> None:
        rank = data.draw(self.workers())
        lease = self.scheduler.work(rank, self.requests[rank], max_tasks)
        if lease is None:
            return
        if is_repeated:
            assert self.scheduler.work(rank, self.requests[rank], max_tasks) is lease
        self.requests[rank] += 1
        if lease.over:
            assert lease.trained and self.scheduler.over
        assert len(lease.tasks) <= max_tasks
        for task in lease.tasks:
            assert task not in self.scheduler.done
            lead = task // 3 - self.scheduler.done.low // 3
            assert lead <= self.bound
        for version, _ in lease.evaluations:
            assert self.scheduler.done.low >= version * 3
        self.tasks[rank] += lease.tasks
        self.evaluations[rank] += lease.evaluations

    @precondition(lambda self: any(self.tasks.values()))
    @rule(data=st.data(), is_repeated=st.booleans())
    def train(self, data: st.DataObject, is_repeated: bool) -> None:
        rank = data.draw(st.sampled_from([r for r, tasks in self.tasks.items() if tasks]))
        task = self.tasks[rank].pop(0)
        if task not in self.applied:
            self.applied.append(task)
        self.scheduler.finish(rank, (task,))
        if is_repeated:
            self.scheduler.finish(rank, (task,))

    @precondition(lambda self: any(self.evaluations.values()))
    @rule(data=st.data())
    def evaluate(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from([r for r, parts in self.evaluations.items() if parts]))
        self.evaluated.add(self.evaluations[rank][0])
        self.scheduler.finish(rank, (), (self.evaluations[rank].pop(0),))

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), is_frozen=st.booleans(), has_pushed=st.booleans())
    def lose_worker(self, data: st.DataObject, is_frozen: bool, has_pushed: bool) -> None:
        """With `has_pushed` the shard has applied a task that the worker has not reported."""
        rank = data.draw(self.workers())
        tasks = self.tasks.pop(rank)
        self.evaluations.pop(rank)
        self.scheduler.requeue(rank)
        if tasks and has_pushed and tasks[0] not in self.applied:
            self.applied.append(tasks[0])
        if is_frozen:
            self.frozen[rank] = tasks

    @precondition(lambda self: self.frozen)
    @rule(data=st.data())
    def resume_frozen(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.frozen)))
        for task in self.frozen.pop(rank):
            if task not in self.applied:
                self.applied.append(task)
            self.scheduler.finish(rank, (task,))

    @rule()
    def begin_attempt(self) -> None:
        self.scheduler.renew(self.scheduler.attempt + 1)
        self.frozen.clear()  # their calls are fenced
        for rank in self.tasks:
            self.tasks[rank], self.evaluations[rank], self.requests[rank] = [], [], 0

    @invariant()
    def done_tasks_were_applied(self) -> None:
        done = {task for task in range(self.plan.tasks) if task in self.scheduler.done}
        assert done <= set(self.applied)

    def teardown(self) -> None:
        """Finish the run with one worker: every sample was in one step of its epoch."""
        self.join() if not self.tasks else None
        rank = min(self.tasks)
        for other in sorted(self.tasks):
            self.scheduler.requeue(other) if other != rank else None
        for _ in range(10 * self.plan.tasks):
            for task in self.tasks[rank]:
                self.applied.append(task) if task not in self.applied else None
                self.scheduler.finish(rank, (task,))
            self.scheduler.finish(rank, (), tuple(self.evaluations[rank]))
            self.evaluated.update(self.evaluations[rank])
            lease = self.scheduler.work(rank, self.requests[rank], 2)
            assert lease is not None, "no other worker has a lease"
            if lease.over:
                break
            self.requests[rank] += 1
            self.tasks[rank], self.evaluations[rank] = list(lease.tasks), list(lease.evaluations)
        assert self.scheduler.over
        assert self.evaluated == {(v, part) for v in (2, 6) for part in range(3)}
        for epoch in range(2):
            first = epoch * self.sampler.steps_per_epoch
            steps = range(first, first + self.sampler.steps_per_epoch)
            ids = [
                sample
                for task in self.applied
                if task // 3 in steps
                for sample in self.sampler.rank_ids(task // 3, task % 3)
            ]
            assert sorted(ids) == list(range(11))


TestRuns = AsynchronousRuns.TestCase
TestRuns.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


class SynchronousRuns(RuleBasedStateMachine):
    """
    Workers that push their part of every step, get lost and are replaced; repeated calls.

    Without leases the ledger commits a step once, with one part of each rank. So every sample of an
    epoch is in exactly one committed step, also if a step is repeated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Sampler(size=11, batch=4, world=3, seed=1)
        self.ledger = StepLedger("run", 0, 3)
        self.ledger.restore(0)
        self.attempt = 0
        self.steps = [0, 0, 0]  # by rank
        self.staged: dict[int, list[int]] = {}
        self.committed: list[list[int]] = []

    @rule(rank=st.integers(0, 2), twice=st.booleans())
    def push(self, rank: int, twice: bool) -> None:
        step = self.steps[rank]
        for _ in range(1 + twice):
            verdict = self.ledger.offer(PushId("run", self.attempt, rank, step))
            if verdict is Verdict.NEW:
                self.staged[rank] = self.sampler.rank_ids(step, rank).tolist()

    @precondition(lambda self: self.ledger.complete)
    @rule(rank=st.integers(0, 2), twice=st.booleans())
    def commit(self, rank: int, twice: bool) -> None:
        """One rank learns of the commit at once, the others with `poll_version`."""
        step = self.ledger.version or 0
        for _ in range(1 + twice):
            if self.ledger.commit(step):
                self.committed.append([sample for ids in self.staged.values() for sample in ids])
                self.staged.clear()
        self.steps[rank] = step + 1

    @rule(rank=st.integers(0, 2))
    def poll_version(self, rank: int) -> None:
        self.steps[rank] = self.ledger.version or 0

    @rule()
    def lose_worker(self) -> None:
        """All ranks resume from the shard's version in a new attempt; late pushes are fenced."""
        self.attempt += 1
        self.ledger.renew(self.attempt)
        self.staged.clear()
        with pytest.raises(FencedError):
            self.ledger.offer(PushId("run", self.attempt - 1, 0, self.steps[0]))
        self.steps = [self.ledger.version or 0] * 3

    @invariant()
    def every_sample_is_in_one_step_of_its_epoch(self) -> None:
        for step, ids in enumerate(self.committed):
            assert sorted(ids) == sorted(self.sampler.batch_ids(step).tolist())
        for epoch in range(len(self.committed) // 3):
            whole = [sample for ids in self.committed[3 * epoch : 3 * epoch + 3] for sample in ids]
            assert sorted(whole) == list(range(11))


TestSynchronousRuns = SynchronousRuns.TestCase
TestSynchronousRuns.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    "trained, steps, evaluations",
    [
        (0, 0, ()),
        (1, 1, (1,)),
        (2, 1, (1,)),
        (3, 2, (2,)),
        (5, 3, (2, 3)),
        (9, 5, (2, 4, 5)),
        (10, 5, (2, 4, 5)),
    ],
)
def test_early_end_completes_the_steps_in_progress(
    trained: int, steps: int, evaluations: tuple[int, ...]
) -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2, evaluations=(2, 4, 5)))
    number = 0
    for _ in range(trained):
        while not tasks(lease := scheduler.work(0, number, 1)):
            assert lease is not None, "there is work"
            scheduler.finish(0, (), lease.evaluations)
            number += 1
        scheduler.finish(0, tuple(tasks(lease)))
        number += 1
    scheduler.end_early()
    scheduler.end_early()
    assert (scheduler.plan.steps, scheduler.plan.evaluations) == (steps, evaluations)
    while not (lease := scheduler.work(0, number, 9)) or not lease.over:
        assert lease is not None, "there is work"
        scheduler.finish(0, tuple(lease.tasks), lease.evaluations)
        number += 1
    assert (lease.trained, lease.steps, scheduler.done.low) == (True, steps, 2 * steps)


def test_early_end_waits_for_leased_tasks() -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2))
    assert tasks(scheduler.work(0, 0, 3)) == [0, 1, 2]
    scheduler.end_early()
    assert tasks(scheduler.work(1, 0, 9)) == [3], "the rest of a step in progress"
    scheduler.requeue(0)
    scheduler.finish(1, (3,))
    assert tasks(scheduler.work(1, 1, 9)) == [0, 1, 2]
    scheduler.finish(1, (0, 1, 2))
    last = scheduler.work(1, 2)
    assert last is not None and (last.over, last.steps) == (True, 2)


def test_early_end_with_saves_skips_evaluations() -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2, evaluations=(1, 5)))
    assert tasks(scheduler.work(0, 0, 3)) == [0, 1, 2]
    scheduler.end_early(saves=True)
    scheduler.finish(0, (0, 1, 2))
    assert tasks(scheduler.work(0, 1, 9)) == [3], "the due evaluation is skipped"
    scheduler.finish(0, (3,))
    last = scheduler.work(0, 2)
    assert last is not None and (last.over, last.trained, last.steps) == (True, True, 2)
    assert last.saves
    scheduler.end_early(saves=False)
    assert (repeated := scheduler.work(0, 3)) is not None and repeated.saves, "saves stays set"
