"""TableStore compared with models: a set of applied tasks, and a count of steps."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jobs import job_of

from distplat.platform.errors import FencedError, GapError, ProtocolError, StaleError, StateLost
from distplat.platform.ledger import PushId, Verdict
from distplat.platform.shard_map import TablePlan, plan_of
from distplat.strategies.server.table_store import RowControl, TableStore

MAX_WORLD = 3
"""Largest world."""
OFFSETS = st.sampled_from([0, 0, 0, 0, -1, -2, 1, 3])
"""Offset of a push's sequence number from the expected one."""


def plan(world: int, *, asynchronous: bool, rewinds: bool = True, **more: Any) -> TablePlan:
    embeddings = {"asynchronous": asynchronous, "optimizer": {"name": "SGD", "lr": 1.0}}
    fields = {"embeddings": embeddings, "steps": 100, "global_batch_size": 12, **more}
    return plan_of(job_of("ring", world, **fields), "run", 0, (), 100, rewinds=rewinds)


def make_store(world: int, steps: int = 0, **options: Any) -> TableStore:
    store = TableStore("embedding-server-1", 1)
    store.open(plan(world, **options), steps, [])
    return store


def push_of_task(rank: int, seq: int, task: int, attempt: int = 0) -> PushId:
    return PushId("run", attempt, rank, seq, task)


def offer(store: TableStore, push: PushId) -> Verdict:
    """Push and commit, as a server does for an asynchronous push."""
    verdict = store.push(push, [], RowControl(skip=False))
    assert store.commit(push.seq, None) is (verdict is Verdict.NEW)
    return verdict


class AsynchronousTables(RuleBasedStateMachine):
    """The model is the set of applied tasks."""

    @initialize(world=st.integers(1, MAX_WORLD), steps=st.integers(0, 2))
    def create(self, world: int, steps: int) -> None:
        self.store = make_store(world, steps, asynchronous=True)
        self.world, self.attempt = world, 0
        self.applied = set(range(steps * world))
        self.next_seq: dict[int, int] = {}

    @rule(
        rank=st.integers(0, MAX_WORLD),
        offset=OFFSETS,
        task_offset=st.integers(-3, 6),
        has_task=st.booleans(),
        late=st.booleans(),
        twice=st.booleans(),
    )
    def push(
        self, rank: int, offset: int, task_offset: int, has_task: bool, late: bool, twice: bool
    ) -> None:
        """The push names a task near the first missing one, or none: the rank's part."""
        seq = max(0, self.next_seq.get(rank, 0) + offset)
        task = max(0, self._first_missing + task_offset) if has_task else None
        attempt = self.attempt - (late and task_offset > 4)
        for _ in range(1 + twice):
            self._offer(PushId("run", attempt, rank, seq, task))

    def _offer(self, push: PushId) -> None:
        expected = self.next_seq.get(push.rank, 0)
        task = push.seq * self.world + push.rank if push.task is None else push.task
        if push.attempt != self.attempt:
            self._assert_rejected(FencedError, push)
        elif push.seq == expected - 1:
            assert self.store.push(push, [], RowControl(skip=False)) is Verdict.REPEAT_COMMITTED
        elif push.seq < expected:
            self._assert_rejected(StaleError, push)
        else:
            assert self.store.push(push, [], RowControl(skip=False)) is (
                Verdict.LATE if task in self.applied else Verdict.NEW
            )
            assert self.store.ledger.complete is (task not in self.applied)
            assert self.store.ledger.passed(push)
            assert self.store.commit(push.seq, None) is (task not in self.applied)
            self.applied.add(task)
            self.next_seq[push.rank] = push.seq + 1

    def _assert_rejected(self, error: type[ProtocolError], push: PushId) -> None:
        with pytest.raises(error):
            self.store.push(push, [], RowControl(skip=False))

    @rule(world=st.none() | st.integers(1, MAX_WORLD))
    def begin_attempt(self, world: int | None) -> None:
        self.attempt += 1
        self.next_seq.clear()
        world = world or self.world
        if world == self.world:
            self.store.renew(self.attempt, world)
        elif len(self.applied) == self._steps * self.world:
            self.store.renew(self.attempt, world)
            self.applied = set(range(self._steps * world))
            self.world = world
        else:
            with pytest.raises(StateLost, match=f"the rest of step {self._steps} on embedding-s"):
                self.store.renew(self.attempt, world)
            self.create(world, 0)  # a restart from scratch

    @rule(more=st.integers(-2, 2))
    def resume_from(self, more: int) -> None:
        """Asynchronous tables do not rewind: repeated tasks are dropped."""
        if more > 0:
            with pytest.raises(ProtocolError, match="is at step"):
                self.store.begin(self._steps + more)
        else:
            self.store.begin(self._steps + more)

    @property
    def _first_missing(self) -> int:
        return next(task for task in range(len(self.applied) + 1) if task not in self.applied)

    @property
    def _steps(self) -> int:
        return self._first_missing // self.world

    @invariant()
    def counters_match_the_model(self) -> None:
        applied = len(self.applied)
        counters = (
            self.store.ledger.attempt,
            self.store.ledger.steps,
            self.store.ledger.updates,
            self.store.ledger.schedule_step,
        )
        assert counters == (self.attempt, self._steps, applied, applied // self.world)


class SynchronousTables(RuleBasedStateMachine):
    """The model is the number of committed steps and the ranks that pushed for the next step."""

    @initialize(world=st.integers(1, MAX_WORLD), steps=st.integers(0, 3), rewinds=st.booleans())
    def create(self, world: int, steps: int, rewinds: bool) -> None:
        self.store = make_store(world, steps, asynchronous=False, rewinds=rewinds)
        self.world, self.attempt, self.rewinds = world, 0, rewinds
        self.steps, self.pushed = steps, set[int]()

    @rule(rank=st.integers(0, MAX_WORLD), offset=OFFSETS, late=st.booleans(), twice=st.booleans())
    def push(self, rank: int, offset: int, late: bool, twice: bool) -> None:
        attempt = self.attempt - (late and offset > 0)
        push = PushId("run", attempt, rank, self.steps + offset)
        for _ in range(1 + twice):
            self._offer(push)

    def _offer(self, push: PushId) -> None:
        if push.attempt != self.attempt or push.rank >= self.world:
            self._assert_rejected(FencedError, push)
        elif push.seq == self.steps - 1:
            assert self.store.push(push, [], RowControl(skip=False)) is Verdict.REPEAT_COMMITTED
            assert self.store.ledger.passed(push)
        elif push.seq != self.steps:
            self._assert_rejected(GapError if push.seq > self.steps else StaleError, push)
        elif push.rank in self.pushed:
            assert self.store.push(push, [], RowControl(skip=False)) is Verdict.REPEAT_STAGED
        else:
            assert self.store.push(push, [], RowControl(skip=False)) is Verdict.NEW
            assert not self.store.ledger.passed(push)
            self.pushed.add(push.rank)
            assert self.store.ledger.complete == (len(self.pushed) == self.world)
            if self.store.ledger.complete:
                assert self.store.commit(push.seq, None)
                self.steps += 1
                self.pushed.clear()

    def _assert_rejected(self, error: type[ProtocolError], push: PushId) -> None:
        with pytest.raises(error):
            self.store.push(push, [], RowControl(skip=False))

    @rule(world=st.integers(1, MAX_WORLD))
    def begin_attempt(self, world: int) -> None:
        """Any world is accepted: no step is ever partly applied."""
        self.attempt += 1
        self.store.renew(self.attempt, world)
        self.world = world
        self.pushed.clear()

    @precondition(lambda self: not self.pushed)
    @rule(more=st.integers(-2, 2))
    def resume_from(self, more: int) -> None:
        version = self.steps + more
        if version < 0:
            return
        if more == -1 and self.rewinds:
            self.store.begin(version)
            self.steps = version
        elif more:
            with pytest.raises(ProtocolError, match=f"step {self.steps}, the workers at {version}"):
                self.store.begin(version)
        else:
            self.store.begin(version)

    @invariant()
    def counters_match_the_model(self) -> None:
        counters = (
            self.store.ledger.attempt,
            self.store.ledger.steps,
            self.store.ledger.updates,
            self.store.ledger.schedule_step,
        )
        assert counters == (self.attempt, self.steps, self.steps, self.steps)
        assert self.store.ledger.missing() == [r for r in range(self.world) if r not in self.pushed]


TestTasks = AsynchronousTables.TestCase
TestTasks.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestSteps = SynchronousTables.TestCase
TestSteps.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("task", [2, 5], ids=["the next", "one ahead"])
def test_partly_applied_step_cannot_change_world(task: int) -> None:
    store = make_store(2, 1, asynchronous=True)
    offer(store, push_of_task(0, 0, task))
    with pytest.raises(StateLost, match="the rest of step 1 on embedding-server-1"):
        store.renew(1, 3)


def test_counters_are_converted_to_the_new_world() -> None:
    store = make_store(2, 1, asynchronous=True)
    for seq, task in enumerate((3, 2)):
        offer(store, push_of_task(7, seq, task))
    store.renew(1, 3)
    assert (store.ledger.steps, store.ledger.updates, store.ledger.schedule_step) == (2, 6, 2)
    assert offer(store, push_of_task(0, 0, 5, attempt=1)) is Verdict.LATE
    assert offer(store, push_of_task(0, 1, 6, attempt=1)) is Verdict.NEW


def test_asynchronous_tables_do_not_rewind() -> None:
    assert not plan(2, asynchronous=True).rewinds
    assert plan(2, asynchronous=False).rewinds
