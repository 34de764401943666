"""The ledger: a table of what it answers, and random histories against a serial model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distplat.platform.errors import FencedError, GapError, NotReadyError, ProtocolError, StaleError
from distplat.platform.ledger import LoopLedger, PushId, StepLedger, TaskLedger, Verdict

JOB, ATTEMPT, WORLD, VERSION = "run", 2, 3, 5
NEW, STAGED, COMMITTED = Verdict.NEW, Verdict.REPEAT_STAGED, Verdict.REPEAT_COMMITTED


def push(rank: int, seq: int = VERSION, attempt: int = ATTEMPT, job: str = JOB) -> PushId:
    return PushId(job, attempt, rank, seq)


def ledger(*staged: int) -> StepLedger:
    book = StepLedger(JOB, ATTEMPT, WORLD)
    book.restore(VERSION)
    for rank in staged:
        assert book.offer(push(rank)) is NEW
    return book


@pytest.mark.parametrize(
    ("staged", "offered", "verdict", "complete", "missing"),
    [
        ((), push(1), NEW, False, [0, 2]),
        ((0, 2), push(1), NEW, True, []),
        ((1,), push(1), STAGED, False, [0, 2]),
        ((0, 1, 2), push(1), STAGED, True, []),
        ((), push(1, VERSION - 1), COMMITTED, False, [0, 1, 2]),
        ((1, 2), push(1, VERSION - 1), COMMITTED, False, [0]),
    ],
)
def test_verdicts(
    staged: tuple[int, ...],
    offered: PushId,
    verdict: Verdict,
    complete: bool,
    missing: list[int],
) -> None:
    book = ledger(*staged)
    assert book.offer(offered) is verdict
    assert (book.complete, book.missing(), book.version) == (complete, missing, VERSION)


@pytest.mark.parametrize(
    ("offered", "error", "message"),
    [
        (push(1, VERSION + 1), GapError, "push 6 of rank 1 refused: expected 5"),
        (push(1, VERSION + 9), GapError, "push 14 of rank 1 refused"),
        (push(1, VERSION - 2), StaleError, "push 3 of rank 1 refused: expected 5"),
        (push(1, 0), StaleError, "push 0 of rank 1 refused"),
        (push(9), FencedError, "push of rank 9 refused: the world has"),
        (push(-1), FencedError, "push of rank -1 refused: the world has"),
        (push(1, attempt=1), FencedError, "attempt 1 refused: this server serves 'run' attempt 2"),
        (push(1, attempt=3), FencedError, "attempt 3 refused"),
        (push(1, job="other"), FencedError, "job 'other' attempt 2 refused"),
    ],
)
def test_refused_pushes_change_nothing(
    offered: PushId, error: type[ProtocolError], message: str
) -> None:
    book = ledger(0)
    with pytest.raises(error, match=message):
        book.offer(offered)
    assert (book.version, book.missing()) == (VERSION, [1, 2])


@pytest.mark.parametrize(
    ("staged", "seq", "error"),
    [
        ((0, 1), VERSION, GapError),
        ((), VERSION, GapError),
        ((0, 1, 2), VERSION + 1, GapError),
        ((0, 1, 2), VERSION - 2, StaleError),
    ],
)
def test_refused_commits_change_nothing(
    staged: tuple[int, ...], seq: int, error: type[ProtocolError]
) -> None:
    book = ledger(*staged)
    with pytest.raises(error, match=f"commit {seq} refused: version is 5"):
        book.commit(seq)
    assert (book.version, len(book.missing())) == (VERSION, WORLD - len(staged))


def test_a_step_is_committed_once() -> None:
    book = ledger(0, 1, 2)
    assert book.commit(VERSION) is True
    assert (book.version, book.missing()) == (VERSION + 1, [0, 1, 2])
    assert book.offer(push(0, VERSION + 1)) is NEW
    assert book.commit(VERSION) is False
    assert (book.version, book.missing()) == (VERSION + 1, [1, 2])


def test_without_parameters_nothing_is_taken() -> None:
    book = StepLedger(JOB, ATTEMPT, WORLD)
    with pytest.raises(NotReadyError):
        book.offer(push(0, 0))
    with pytest.raises(NotReadyError):
        book.commit(0)
    book.restore(0)
    assert book.offer(push(0, 0)) is NEW


def test_a_restore_forgets_what_was_staged() -> None:
    book = ledger(0, 1)
    book.restore(VERSION)
    assert book.missing() == [0, 1, 2]


class Histories(RuleBasedStateMachine):
    """
    A shard that does what the ledger says, under messages that come late, twice or out of turn.

    `applied` is what an optimizer would see: the ranks whose gradients went into each step. It must
    be every rank, once, for every step, in order, whatever was sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attempt, self.world = 0, WORLD
        self.applied: list[list[int]] = []
        self.worlds: list[int] = []  #: by step, how many ranks were to make it
        self._start()

    def _start(self) -> None:
        self.book = StepLedger(JOB, self.attempt, self.world)
        self.book.restore(len(self.applied))
        self.staged: list[int] = []

    @rule()
    def a_worker_is_replaced(self) -> None:
        """The shard stays: what is staged is pushed once more, by all, in the next attempt."""
        self.attempt += 1
        self.book.renew(self.attempt)
        self.staged.clear()

    @rule(world=st.integers(1, 5))
    def workers_come_or_go(self, world: int) -> None:
        """The same, and so many are to push from now on."""
        self.attempt, self.world = self.attempt + 1, world
        self.book.renew(self.attempt, world)
        self.staged.clear()

    @rule(
        rank=st.integers(0, 5),
        ahead=st.sampled_from([0, 0, 0, -1, -2, -3, 1, 2]),
        behind=st.sampled_from([0, 0, 0, 0, 1, 2]),
    )
    def push_comes(self, rank: int, ahead: int, behind: int) -> None:
        """A push for `ahead` steps from now, of `behind` attempts ago."""
        now = len(self.applied)
        offered = push(rank, now + ahead, self.attempt - behind)
        if behind or rank >= self.world:
            self._refused(FencedError, offered)
        elif ahead > 0:
            self._refused(GapError, offered)
        elif ahead < -1:
            self._refused(StaleError, offered)
        elif ahead == -1:
            assert self.book.offer(offered) is COMMITTED
        else:
            expected = STAGED if rank in self.staged else NEW
            assert self.book.offer(offered) is expected
            if expected is NEW:
                self.staged.append(rank)

    def _refused(self, error: type[ProtocolError], offered: PushId) -> None:
        with pytest.raises(error):
            self.book.offer(offered)

    @rule(ahead=st.sampled_from([0, 0, 0, -1, -2, 1]))
    def commit_comes(self, ahead: int) -> None:
        """A commit of the present step, a repeated one, one out of turn."""
        now = len(self.applied)
        if ahead == -1:
            assert self.book.commit(now - 1) is False
        elif ahead == 0 and len(self.staged) == self.world:
            self._commit()
        else:
            with pytest.raises(StaleError if ahead < 0 else GapError):
                self.book.commit(now + ahead)

    @precondition(lambda self: len(self.staged) < self.world)
    @rule(order=st.permutations(range(5)))
    def step_goes_through(self, order: list[int]) -> None:
        """What is missing comes, in any order, and is committed: histories get long."""
        for rank in [one for one in order if one < self.world]:
            if self.book.offer(push(rank, len(self.applied), self.attempt)) is NEW:
                self.staged.append(rank)
        self._commit()

    def _commit(self) -> None:
        assert self.book.commit(len(self.applied)) is True
        self.applied.append(self.staged)
        self.worlds.append(self.world)
        self.staged = []

    @rule()
    def shard_is_replaced(self) -> None:
        """A recovery: a fresh ledger of the next attempt, at the committed version."""
        self.attempt += 1
        self._start()

    @invariant()
    def nothing_is_lost_and_nothing_counted_twice(self) -> None:
        """Every step that was applied had every rank's gradient, once."""
        for ranks, world in zip(self.applied, self.worlds, strict=True):
            assert sorted(ranks) == list(range(world))
        assert self.book.version == len(self.applied)
        assert self.book.complete == (len(self.staged) == self.world)
        assert self.book.missing() == sorted(set(range(self.world)) - set(self.staged))


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def leased(rank: int, seq: int, task: int | None, attempt: int = ATTEMPT) -> PushId:
    return PushId(JOB, attempt, rank, seq, task)


def offer(book: TaskLedger, push: PushId) -> Verdict:
    """Offer a push, and book its update, as a server does in one go."""
    verdict = book.offer(push)
    assert book.complete is (verdict is NEW) and book.passed(push)
    assert book.commit(push.seq) is (verdict is NEW)
    assert not book.complete
    return verdict


def test_of_a_leased_task_the_first_push_counts() -> None:
    book = TaskLedger(JOB, ATTEMPT, 1)
    with pytest.raises(NotReadyError):
        book.offer(leased(0, 0, 7))
    book.restore(6)
    assert offer(book, leased(0, 0, 7)) is NEW
    assert offer(book, leased(0, 0, 7)) is COMMITTED
    assert offer(book, leased(9, 0, 7)) is Verdict.LATE  # it got the lease of one that was not lost
    assert offer(book, leased(9, 0, 7)) is COMMITTED
    assert offer(book, leased(9, 1, 5)) is Verdict.LATE  # made before the checkpoint
    assert offer(book, leased(9, 2, 6)) is NEW
    assert (book.version, book.applied.low, book.dropped) == (8, 8, {9: 2})


@pytest.mark.parametrize(
    ("offered", "error"),
    [
        (leased(0, 0, 9), StaleError),  # late: the worker computes on what a later one brought
        (leased(0, -1, 9), StaleError),
        (leased(0, 3, 9, attempt=1), FencedError),
        (leased(0, 3, 9, attempt=3), FencedError),
        (leased(-1, 0, 9), FencedError),
        (leased(0, 3, None), FencedError),
    ],
)
def test_pushes_of_leased_tasks_that_are_refused(
    offered: PushId, error: type[ProtocolError]
) -> None:
    book = TaskLedger(JOB, ATTEMPT, 1)
    book.restore(0)
    for seq in range(3):
        offer(book, leased(0, seq, seq))
    with pytest.raises(error):
        book.offer(offered)
    assert (book.version, book.applied.low) == (3, 3)


def test_in_a_new_attempt_pushes_are_numbered_anew_and_tasks_stay_made() -> None:
    book = TaskLedger(JOB, ATTEMPT, 1)
    book.restore(0)
    offer(book, leased(0, 0, 0))
    book.renew(ATTEMPT + 1)
    assert offer(book, leased(0, 0, 0, ATTEMPT + 1)) is Verdict.LATE
    assert offer(book, leased(0, 1, 1, ATTEMPT + 1)) is NEW
    assert book.version == 2


def loop_ledger(pushes: tuple[int, ...], bound: int | None = None) -> LoopLedger:
    """Give the ledger of three ranks that have pushed so often."""
    book = LoopLedger(JOB, ATTEMPT, 3, bound)
    book.restore(0)
    for rank, count in enumerate(pushes):
        for seq in range(count):
            assert book.offer(push(rank, seq)) is NEW
            assert book.complete
            assert book.commit(seq)
    return book


@pytest.mark.parametrize(
    ("pushes", "bound", "left", "passed", "missing"),
    [
        ((5, 0, 0), None, (), True, [1, 2]),
        ((1, 1, 1), 0, (), True, [0, 1, 2]),
        ((1, 1, 0), 0, (), False, [2]),
        ((2, 1, 1), 1, (), True, [1, 2]),
        ((3, 1, 2), 1, (), False, [1]),
        ((3, 1, 2), 1, (1,), True, [2]),
        ((9, 1, 2), 1, (1, 2), True, [0]),
    ],
)
def test_a_loops_push_passes_unless_it_is_too_far_ahead(
    pushes: tuple[int, ...],
    bound: int | None,
    left: tuple[int, ...],
    passed: bool,
    missing: list[int],
) -> None:
    book = loop_ledger(pushes, bound)
    book.finished_ranks.update(left)
    assert book.passed(push(0, pushes[0] - 1)) is passed
    assert book.missing() == missing
    assert (book.updates, book.steps) == (sum(pushes), sum(pushes) // 3)


@pytest.mark.parametrize(
    ("offered", "answer"),
    [
        (push(0, 1), COMMITTED),
        (push(0, 2), NEW),
        (push(1, 0), NEW),
        (push(0, 0), StaleError),
        (push(0, 3), GapError),
        (push(3, 0), FencedError),
        (push(0, 2, ATTEMPT + 1), FencedError),
    ],
)
def test_a_loops_pushes_are_numbered(offered: PushId, answer: Verdict | type[Exception]) -> None:
    book = loop_ledger((2, 0, 0))
    if isinstance(answer, Verdict):
        assert book.offer(offered) is answer
    else:
        with pytest.raises(answer):
            book.offer(offered)
    assert book.updates == 2
