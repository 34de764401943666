"""What a server of tables has: against a set of tasks, and against a count of steps."""

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

MOST = 3
"""Ranks of a world."""
NUMBERS = st.sampled_from([0, 0, 0, 0, -1, -2, 1, 3])
"""How far a push's number is from the one whose turn it is."""


def plan(world: int, *, asynchronous: bool, rewinds: bool = True, **more: Any) -> TablePlan:
    embeddings = {"asynchronous": asynchronous, "optimizer": {"name": "SGD", "lr": 1.0}}
    fields = {"embeddings": embeddings, "steps": 100, "global_batch_size": 12, **more}
    return plan_of(job_of("ring", world, **fields), "run", 0, (), 100, rewinds=rewinds)


def book(world: int, steps: int = 0, **how: Any) -> TableStore:
    store = TableStore("embedding-server-1", 1)
    store.open(plan(world, **how), steps, [])
    return store


def leased(rank: int, seq: int, task: int, attempt: int = 0) -> PushId:
    return PushId("run", attempt, rank, seq, task)


def offer(book: TableStore, push: PushId) -> Verdict:
    """Have it take a push, and make its update, as a server does in one go."""
    verdict = book.push(push, [], RowControl(skip=False))
    assert book.commit(push.seq, None) is (verdict is Verdict.NEW)
    return verdict


class Tasks(RuleBasedStateMachine):
    """Asynchronous tables: the model is the set of tasks that are in them."""

    @initialize(world=st.integers(1, MOST), steps=st.integers(0, 2))
    def begins(self, world: int, steps: int) -> None:
        self.book = book(world, steps, asynchronous=True)
        self.world, self.attempt = world, 0
        self.made = set(range(steps * world))
        self.next: dict[int, int] = {}

    @rule(
        rank=st.integers(0, MOST),
        ahead=NUMBERS,
        beyond=st.integers(-3, 6),
        named=st.booleans(),
        late=st.booleans(),
        twice=st.booleans(),
    )
    def push_comes(
        self, rank: int, ahead: int, beyond: int, named: bool, late: bool, twice: bool
    ) -> None:
        """A task around the lowest one that is missing; or the rank's part of a step."""
        seq = max(0, self.next.get(rank, 0) + ahead)
        task = max(0, self._low + beyond) if named else None
        attempt = self.attempt - (late and beyond > 4)
        for _ in range(1 + twice):
            self._offer(PushId("run", attempt, rank, seq, task))

    def _offer(self, push: PushId) -> None:
        expected = self.next.get(push.rank, 0)
        task = push.seq * self.world + push.rank if push.task is None else push.task
        if push.attempt != self.attempt:
            self._refused(FencedError, push)
        elif push.seq == expected - 1:
            assert self.book.push(push, [], RowControl(skip=False)) is Verdict.REPEAT_COMMITTED
        elif push.seq < expected:
            self._refused(StaleError, push)
        else:
            assert self.book.push(push, [], RowControl(skip=False)) is (
                Verdict.LATE if task in self.made else Verdict.NEW
            )
            assert self.book.ledger.complete is (task not in self.made)
            assert self.book.ledger.passed(push)
            assert self.book.commit(push.seq, None) is (task not in self.made)
            self.made.add(task)
            self.next[push.rank] = push.seq + 1

    def _refused(self, error: type[ProtocolError], push: PushId) -> None:
        with pytest.raises(error):
            self.book.push(push, [], RowControl(skip=False))

    @rule(world=st.none() | st.integers(1, MOST))
    def attempt_begins(self, world: int | None) -> None:
        self.attempt += 1
        self.next.clear()
        world = world or self.world
        if world == self.world:
            self.book.renew(self.attempt, world)
        elif len(self.made) == self._steps * self.world:
            self.book.renew(self.attempt, world)
            self.made = set(range(self._steps * world))
            self.world = world
        else:
            with pytest.raises(StateLost, match=f"the rest of step {self._steps} on embedding-s"):
                self.book.renew(self.attempt, world)
            self.begins(world, 0)  # all is made anew

    @rule(more=st.integers(-2, 2))
    def goes_on_from(self, more: int) -> None:
        """Never back: what is there already will be dropped when it comes again."""
        if more > 0:
            with pytest.raises(ProtocolError, match="is at step"):
                self.book.begin(self._steps + more)
        else:
            self.book.begin(self._steps + more)

    @property
    def _low(self) -> int:
        return next(task for task in range(len(self.made) + 1) if task not in self.made)

    @property
    def _steps(self) -> int:
        return self._low // self.world

    @invariant()
    def it_has_what_the_set_has(self) -> None:
        made = len(self.made)
        found = (
            self.book.ledger.attempt,
            self.book.ledger.steps,
            self.book.ledger.updates,
            self.book.ledger.schedule_step,
        )
        assert found == (self.attempt, self._steps, made, made // self.world)


class Steps(RuleBasedStateMachine):
    """Synchronous tables: the model is how many steps are made, and who has pushed for the next."""

    @initialize(world=st.integers(1, MOST), steps=st.integers(0, 3), rewinds=st.booleans())
    def begins(self, world: int, steps: int, rewinds: bool) -> None:
        self.book = book(world, steps, asynchronous=False, rewinds=rewinds)
        self.world, self.attempt, self.rewinds = world, 0, rewinds
        self.steps, self.pushed = steps, set[int]()

    @rule(rank=st.integers(0, MOST), ahead=NUMBERS, late=st.booleans(), twice=st.booleans())
    def push_comes(self, rank: int, ahead: int, late: bool, twice: bool) -> None:
        attempt = self.attempt - (late and ahead > 0)
        push = PushId("run", attempt, rank, self.steps + ahead)
        for _ in range(1 + twice):
            self._offer(push)

    def _offer(self, push: PushId) -> None:
        if push.attempt != self.attempt or push.rank >= self.world:
            self._refused(FencedError, push)
        elif push.seq == self.steps - 1:
            assert self.book.push(push, [], RowControl(skip=False)) is Verdict.REPEAT_COMMITTED
            assert self.book.ledger.passed(push)
        elif push.seq != self.steps:
            self._refused(GapError if push.seq > self.steps else StaleError, push)
        elif push.rank in self.pushed:
            assert self.book.push(push, [], RowControl(skip=False)) is Verdict.REPEAT_STAGED
        else:
            assert self.book.push(push, [], RowControl(skip=False)) is Verdict.NEW
            assert not self.book.ledger.passed(push)
            self.pushed.add(push.rank)
            assert self.book.ledger.complete == (len(self.pushed) == self.world)
            if self.book.ledger.complete:
                assert self.book.commit(push.seq, None)
                self.steps += 1
                self.pushed.clear()

    def _refused(self, error: type[ProtocolError], push: PushId) -> None:
        with pytest.raises(error):
            self.book.push(push, [], RowControl(skip=False))

    @rule(world=st.integers(1, MOST))
    def attempt_begins(self, world: int) -> None:
        """With any number of ranks: nothing is ever made in part."""
        self.attempt += 1
        self.book.renew(self.attempt, world)
        self.world = world
        self.pushed.clear()

    @precondition(lambda self: not self.pushed)
    @rule(more=st.integers(-2, 2))
    def goes_on_from(self, more: int) -> None:
        version = self.steps + more
        if version < 0:
            return  # there is no such step
        if more == -1 and self.rewinds:
            self.book.begin(version)
            self.steps = version
        elif more:
            with pytest.raises(ProtocolError, match=f"step {self.steps}, the workers at {version}"):
                self.book.begin(version)
        else:
            self.book.begin(version)

    @invariant()
    def it_counts(self) -> None:
        found = (
            self.book.ledger.attempt,
            self.book.ledger.steps,
            self.book.ledger.updates,
            self.book.ledger.schedule_step,
        )
        assert found == (self.attempt, self.steps, self.steps, self.steps)
        assert self.book.ledger.missing() == [r for r in range(self.world) if r not in self.pushed]


TestTasks = Tasks.TestCase
TestTasks.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("task", [2, 5], ids=["the next", "one ahead"])
def test_a_step_that_is_made_in_part_cannot_be_cut_anew(task: int) -> None:
    mine = book(2, 1, asynchronous=True)
    offer(mine, leased(0, 0, task))
    with pytest.raises(StateLost, match="the rest of step 1 on embedding-server-1"):
        mine.renew(1, 3)


def test_whole_steps_are_counted_in_the_parts_of_the_new_world() -> None:
    mine = book(2, 1, asynchronous=True)
    for seq, task in enumerate((3, 2)):
        offer(mine, leased(7, seq, task))
    mine.renew(1, 3)
    assert (mine.ledger.steps, mine.ledger.updates, mine.ledger.schedule_step) == (2, 6, 2)
    assert offer(mine, leased(0, 0, 5, attempt=1)) is Verdict.LATE
    assert offer(mine, leased(0, 1, 6, attempt=1)) is Verdict.NEW


def test_asynchronous_tables_keep_nothing_to_take_back() -> None:
    assert not plan(2, asynchronous=True).rewinds
    assert plan(2, asynchronous=False).rewinds
