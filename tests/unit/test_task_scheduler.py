"""Leases: every task is made, in order, by whoever is there; nothing is lost with a worker."""

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


def test_tasks_are_leased_in_order_to_whoever_asks() -> None:
    scheduler = TaskScheduler(TaskPlan(steps=3, parts=2))
    assert tasks(scheduler.work(0, 0, 2)) == [0, 1]
    assert tasks(scheduler.work(7, 0, 1)) == [2]
    assert tasks(scheduler.work(0, 1, 2)) == [3, 4]
    assert (scheduler.held(0), scheduler.held(7), scheduler.left) == ([0, 1, 3, 4], [2], 1)
    assert tasks(scheduler.work(7, 1, 5)) == [5]
    assert scheduler.work(7, 2) is None, "all are leased, and others may be lost: it waits"
    scheduler.finish(7, (2, 5))
    scheduler.finish(0, (0, 1, 3))
    assert scheduler.work(7, 2) is None
    scheduler.finish(0, (4,))
    last = scheduler.work(7, 2)
    assert last is not None and (last.trained, last.over) == (True, True)


def test_a_question_asked_again_gets_the_same_answer() -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2))
    first = scheduler.work(0, 0, 3)
    assert scheduler.work(0, 0, 3) is first
    assert tasks(scheduler.work(0, 1, 3)) == [3, 4, 5]
    with pytest.raises(StaleError, match="request 0 of rank 0"):
        scheduler.work(0, 0, 3)


def test_what_a_lost_worker_held_is_leased_before_anything_new() -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2))
    scheduler.work(0, 0, 4)
    scheduler.work(1, 0, 1)
    scheduler.finish(0, (0, 2))
    scheduler.requeue(0)
    scheduler.requeue(0)
    assert scheduler.held(0) == []
    assert tasks(scheduler.work(1, 1, 4)) == [1], "a lease is one run of tasks"
    assert tasks(scheduler.work(1, 2, 4)) == [3]
    assert tasks(scheduler.work(1, 3, 4)) == [5, 6, 7, 8]


def test_who_was_only_slow_is_heard_and_what_was_made_twice_is_counted() -> None:
    scheduler = TaskScheduler(TaskPlan(3, 1))
    scheduler.work(0, 0, 2)
    scheduler.requeue(0)
    assert tasks(scheduler.work(1, 0, 1)) == [0]
    scheduler.finish(0, (0, 1))  # it was frozen
    scheduler.finish(1, (0,))
    assert (scheduler.duplicates, scheduler.done.low) == (1, 2)
    assert tasks(scheduler.work(1, 1, 1)) == [2], "task 1 need not be leased again"


def test_what_another_has_made_is_not_leased_again_when_its_holder_is_lost() -> None:
    scheduler = TaskScheduler(TaskPlan(3, 1))
    scheduler.work(0, 0, 2)
    scheduler.requeue(0)
    assert tasks(scheduler.work(1, 0, 2)) == [0, 1]
    scheduler.finish(0, (0,))  # it was frozen
    scheduler.requeue(1)
    assert scheduler.left == 2
    assert tasks(scheduler.work(2, 0, 9)) == [1]


def test_the_same_news_twice_counts_once() -> None:
    scheduler = TaskScheduler(TaskPlan(2, 1))
    scheduler.work(0, 0, 2)
    scheduler.finish(0, (0,))
    scheduler.finish(0, (0, 1))
    assert (scheduler.duplicates, scheduler.trained) == (0, True)


@pytest.mark.parametrize("task", [-1, 1, 6])
def test_a_task_that_the_run_has_not_is_refused(task: int) -> None:
    with pytest.raises(ProtocolError, match=f"reported task {task}"):
        TaskScheduler(TaskPlan(3, 2, first=1)).finish(0, (task,))


def test_a_new_attempt_begins_with_what_was_not_done() -> None:
    scheduler = TaskScheduler(TaskPlan(4, 1, evaluations=(4,)))
    for worker in range(3):
        scheduler.work(worker, 0)
    scheduler.finish(1, (1,))
    scheduler.renew(1)
    assert [tasks(scheduler.work(1, number)) for number in range(3)] == [[0], [2], [3]]
    scheduler.renew(1)  # every rank that comes says so
    assert scheduler.held(1) == [0, 2, 3]


@pytest.mark.parametrize(("bound", "allowed"), [(0, 2), (1, 4), (3, 8), (None, 20)])
def test_no_lease_is_further_ahead_than_the_bound(bound: int | None, allowed: int) -> None:
    scheduler = TaskScheduler(TaskPlan(10, 2), bound)
    assert tasks(scheduler.work(0, 0, 99)) == list(range(allowed))
    if bound is not None:
        assert scheduler.work(1, 0, 99) is None
        scheduler.finish(0, tuple(range(1, allowed)))
        assert scheduler.work(1, 0, 99) is None, "the oldest task is not done"
        scheduler.finish(0, (0,))
        assert tasks(scheduler.work(1, 0, 99)) == list(range(allowed, min(20, 2 * allowed)))


def test_evaluations_are_told_in_their_order() -> None:
    scheduler = TaskScheduler(TaskPlan(2, 1, evaluations=(1, 2)))
    assert tasks(scheduler.work(0, 0, 1)) == [0]
    scheduler.finish(0, (0,))
    slow = scheduler.work(0, 1)
    assert slow is not None and slow.evaluations == ((1, 0),)
    assert tasks(scheduler.work(1, 0, 1)) == [1]
    scheduler.finish(1, (1,))
    assert scheduler.work(1, 1) is None, "the one before is under way"
    scheduler.finish(0, (), ((1, 0),))
    last = scheduler.work(1, 1)
    assert last is not None and last.evaluations == ((2, 0),)


def test_evaluations_are_leased_when_their_steps_are_done() -> None:
    scheduler = TaskScheduler(TaskPlan(2, 2, evaluations=(1, 2)))
    assert tasks(scheduler.work(0, 0, 2)) == [0, 1]
    assert tasks(scheduler.work(1, 0, 1)) == [2]
    scheduler.finish(0, (0, 1))
    found = scheduler.work(0, 1, 2)
    assert found is not None and (found.evaluations, found.tasks) == (((1, 0),), range(0))
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


def test_no_task_is_leased_before_the_evaluation_of_step_0_is_done() -> None:
    scheduler = TaskScheduler(TaskPlan(2, 2, evaluations=(0, 2)))
    first = scheduler.work(0, 0, 9)
    assert first is not None and (first.evaluations, first.tasks) == (((0, 0),), range(0))
    second = scheduler.work(1, 0, 9)
    assert second is not None and second.evaluations == ((0, 1),)
    scheduler.finish(0, (), ((0, 0),))
    assert scheduler.work(0, 1, 9) is None, "the other part is not done"
    scheduler.requeue(1)
    again = scheduler.work(0, 1, 9)
    assert again is not None and again.evaluations == ((0, 1),)
    assert scheduler.work(1, 1, 9) is None
    scheduler.finish(0, (), ((0, 1),))
    assert tasks(scheduler.work(1, 1, 9)) == [0, 1, 2, 3]
    scheduler.requeue(1)
    scheduler.renew(1)
    assert tasks(scheduler.work(0, 0, 9)) == [0, 1, 2, 3], "it is not made again"


@pytest.mark.parametrize("evaluated", [0, 1, 2])
def test_a_run_that_ends_before_its_first_task_has_one_evaluation(evaluated: int) -> None:
    scheduler, number = TaskScheduler(TaskPlan(2, 2, evaluations=(0, 2))), 0
    for number in range(evaluated):
        lease = scheduler.work(0, number, 9)
        assert lease is not None
        scheduler.finish(0, (), lease.evaluations)
    scheduler.end_early()
    made = evaluated
    while (lease := scheduler.work(0, number + 1, 9)) and not lease.over:
        made, number = made + len(lease.evaluations), number + 1
        scheduler.finish(0, (), lease.evaluations)
    assert lease is not None and (lease.steps, made) == (0, 2)


def test_a_worker_that_is_dismissed_gets_nothing_more() -> None:
    scheduler = TaskScheduler(TaskPlan(4, 1))
    scheduler.work(0, 0)
    scheduler.dismiss(0)
    assert scheduler.work(0, 1) is None, "it asks before it has told of its last task"
    scheduler.finish(0, (0,))
    found = scheduler.work(0, 1)
    assert found is not None and (found.over, found.trained) == (True, False)
    assert [tasks(scheduler.work(1, number)) for number in range(3)] == [[1], [2], [3]]


def test_a_worker_that_is_dismissed_and_not_heard_of_holds_nobody_up() -> None:
    scheduler = TaskScheduler(TaskPlan(4, 1), bound=0)
    scheduler.work(0, 0)
    scheduler.dismiss(0)
    scheduler.requeue(0)
    found = scheduler.work(0, 1)
    assert found is not None and found.over
    assert tasks(scheduler.work(1, 0)) == [0]


def test_who_is_dismissed_at_the_end_just_ends() -> None:
    scheduler = TaskScheduler(TaskPlan(1, 1, evaluations=(1,)))
    scheduler.work(0, 0)
    scheduler.dismiss(0)
    scheduler.finish(1, (0,))  # somebody else has made it
    scheduler.finish(1, (), ((1, 0),))
    found = scheduler.work(0, 1)
    assert found is not None and (found.over, found.trained) == (True, True)


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
def test_the_size_of_a_lease(task_s: float | None, left: int, workers: int, size: int) -> None:
    assert lease_size(task_s, left, workers) == size


def test_spans() -> None:
    spans = IntervalSet(3)
    assert [spans.add(number) for number in (2, 5, 3, 5, 4, 7)] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert (spans.low, spans.above) == (6, {7})
    assert [number in spans for number in (0, 5, 6, 7)] == [True, True, False, True]


class Runs(RuleBasedStateMachine):
    """
    Workers that come, go, die, freeze and wake up; calls that are made again; new attempts.

    Beside the scheduler stands a shard that takes the first gradient of each task. At the end every
    sample of every epoch is in exactly one task that the shard has, and what was made more often
    than once is what was counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Sampler(size=11, batch=4, world=3, seed=1)
        self.plan = TaskPlan(2 * self.sampler.steps_per_epoch, 3, evaluations=(2, 6))
        self.bound = 2
        self.scheduler = TaskScheduler(self.plan, self.bound)
        self.next = 0  # a fresh rank
        self.holds: dict[int, list[int]] = {}
        self.evals: dict[int, list[tuple[int, int]]] = {}
        self.asked: dict[int, int] = {}
        self.frozen: dict[int, list[int]] = {}
        self.made: list[int] = []  # at the shard, in order
        self.evaluated: set[tuple[int, int]] = set()

    def workers(self) -> st.SearchStrategy[int]:
        return st.sampled_from(sorted(self.holds))

    @rule()
    def joins(self) -> None:
        if len(self.holds) < 4:
            self.holds[self.next], self.evals[self.next], self.asked[self.next] = [], [], 0
            self.next += 1

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), most=st.integers(1, 5), lost_answer=st.booleans())
    def asks(self, data: st.DataObject, most: int, lost_answer: bool) -> None:
        rank = data.draw(self.workers())
        found = self.scheduler.work(rank, self.asked[rank], most)
        if found is None:
            return
        if lost_answer:
            assert self.scheduler.work(rank, self.asked[rank], most) is found
        self.asked[rank] += 1
        if found.over:
            assert found.trained and self.scheduler.over
        assert len(found.tasks) <= most
        for task in found.tasks:
            assert task not in self.scheduler.done
            lead = task // 3 - self.scheduler.done.low // 3
            assert lead <= self.bound
        for version, _ in found.evaluations:
            assert self.scheduler.done.low >= version * 3
        self.holds[rank] += found.tasks
        self.evals[rank] += found.evaluations

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data(), told=st.booleans())
    def makes(self, data: st.DataObject, told: bool) -> None:
        rank = data.draw(st.sampled_from([r for r, held in self.holds.items() if held]))
        task = self.holds[rank].pop(0)
        if task not in self.made:
            self.made.append(task)
        self.scheduler.finish(rank, (task,))
        if told:
            self.scheduler.finish(rank, (task,))

    @precondition(lambda self: any(self.evals.values()))
    @rule(data=st.data())
    def evaluates(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from([r for r, held in self.evals.items() if held]))
        self.evaluated.add(self.evals[rank][0])
        self.scheduler.finish(rank, (), (self.evals[rank].pop(0),))

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), comes_back=st.booleans(), pushed=st.booleans())
    def is_lost(self, data: st.DataObject, comes_back: bool, pushed: bool) -> None:
        """Perhaps with a push that the shard has and the scheduler has not heard of."""
        rank = data.draw(self.workers())
        held = self.holds.pop(rank)
        self.evals.pop(rank)
        self.scheduler.requeue(rank)
        if held and pushed and held[0] not in self.made:
            self.made.append(held[0])
        if comes_back:
            self.frozen[rank] = held

    @precondition(lambda self: self.frozen)
    @rule(data=st.data())
    def wakes(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.frozen)))
        for task in self.frozen.pop(rank):
            if task not in self.made:
                self.made.append(task)
            self.scheduler.finish(rank, (task,))

    @rule()
    def a_new_attempt_begins(self) -> None:
        self.scheduler.renew(self.scheduler.attempt + 1)
        self.frozen.clear()  # fenced off
        for rank in self.holds:
            self.holds[rank], self.evals[rank], self.asked[rank] = [], [], 0

    @invariant()
    def what_is_done_was_made(self) -> None:
        done = {task for task in range(self.plan.tasks) if task in self.scheduler.done}
        assert done <= set(self.made)

    def teardown(self) -> None:
        """Have one worker make what is left: then every sample was in one step of its epoch."""
        self.joins() if not self.holds else None
        rank = min(self.holds)
        for other in sorted(self.holds):
            self.scheduler.requeue(other) if other != rank else None
        for _ in range(10 * self.plan.tasks):
            for task in self.holds[rank]:
                self.made.append(task) if task not in self.made else None
                self.scheduler.finish(rank, (task,))
            self.scheduler.finish(rank, (), tuple(self.evals[rank]))
            self.evaluated.update(self.evals[rank])
            found = self.scheduler.work(rank, self.asked[rank], 2)
            assert found is not None, "nobody else has anything"
            if found.over:
                break
            self.asked[rank] += 1
            self.holds[rank], self.evals[rank] = list(found.tasks), list(found.evaluations)
        assert self.scheduler.over
        assert self.evaluated == {(v, part) for v in (2, 6) for part in range(3)}
        for epoch in range(2):
            first = epoch * self.sampler.steps_per_epoch
            steps = range(first, first + self.sampler.steps_per_epoch)
            ids = [
                sample
                for task in self.made
                if task // 3 in steps
                for sample in self.sampler.rank_ids(task // 3, task % 3)
            ]
            assert sorted(ids) == list(range(11))


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


class SynchronousRuns(RuleBasedStateMachine):
    """
    Workers that make their part of every step, die, and are replaced; calls that are made again.

    Nothing is leased: the ledger commits a step once, with one part of each rank. So every sample
    of an epoch is in exactly one committed step, however often a step was begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Sampler(size=11, batch=4, world=3, seed=1)
        self.ledger = StepLedger("run", 0, 3)
        self.ledger.restore(0)
        self.attempt = 0
        self.at = [0, 0, 0]  # the step that each rank is in
        self.staged: dict[int, list[int]] = {}
        self.committed: list[list[int]] = []

    @rule(rank=st.integers(0, 2), twice=st.booleans())
    def pushes(self, rank: int, twice: bool) -> None:
        step = self.at[rank]
        for _ in range(1 + twice):
            verdict = self.ledger.offer(PushId("run", self.attempt, rank, step))
            if verdict is Verdict.NEW:
                self.staged[rank] = self.sampler.rank_ids(step, rank).tolist()

    @precondition(lambda self: self.ledger.complete)
    @rule(who=st.integers(0, 2), twice=st.booleans())
    def commits(self, who: int, twice: bool) -> None:
        """One rank hears of it at once, the others when they ask."""
        step = self.ledger.version or 0
        for _ in range(1 + twice):
            if self.ledger.commit(step):
                self.committed.append([sample for ids in self.staged.values() for sample in ids])
                self.staged.clear()
        self.at[who] = step + 1

    @rule(rank=st.integers(0, 2))
    def hears(self, rank: int) -> None:
        self.at[rank] = self.ledger.version or 0

    @rule()
    def somebody_is_lost(self) -> None:
        """All go on from what the shard has, under a new number; late pushes are refused."""
        self.attempt += 1
        self.ledger.renew(self.attempt)
        self.staged.clear()
        with pytest.raises(FencedError):
            self.ledger.offer(PushId("run", self.attempt - 1, 0, self.at[0]))
        self.at = [self.ledger.version or 0] * 3

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
    "made, steps, evaluations",
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
def test_an_early_end_comes_after_the_steps_that_were_begun(
    made: int, steps: int, evaluations: tuple[int, ...]
) -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2, evaluations=(2, 4, 5)))
    number = 0
    for _ in range(made):
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


def test_what_a_worker_holds_is_made_before_an_early_end() -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2))
    assert tasks(scheduler.work(0, 0, 3)) == [0, 1, 2]
    scheduler.end_early()
    assert tasks(scheduler.work(1, 0, 9)) == [3], "of a step that was begun"
    scheduler.requeue(0)
    scheduler.finish(1, (3,))
    assert tasks(scheduler.work(1, 1, 9)) == [0, 1, 2]
    scheduler.finish(1, (0, 1, 2))
    last = scheduler.work(1, 2)
    assert last is not None and (last.over, last.steps) == (True, 2)


def test_a_run_that_is_to_stop_evaluates_no_more_and_saves() -> None:
    scheduler = TaskScheduler(TaskPlan(5, 2, evaluations=(1, 5)))
    assert tasks(scheduler.work(0, 0, 3)) == [0, 1, 2]
    scheduler.end_early(saves=True)
    scheduler.finish(0, (0, 1, 2))
    assert tasks(scheduler.work(0, 1, 9)) == [3], "no evaluation, though one was due"
    scheduler.finish(0, (3,))
    last = scheduler.work(0, 2)
    assert last is not None and (last.over, last.trained, last.steps) == (True, True, 2)
    assert last.saves
    scheduler.end_early(saves=False)
    assert (again := scheduler.work(0, 3)) is not None and again.saves, "asked twice"
