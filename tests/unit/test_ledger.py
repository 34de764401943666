"""The ledger: tables of verdicts, and random histories against a serial model."""

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


def step_ledger(*staged: int) -> StepLedger:
    ledger = StepLedger(JOB, ATTEMPT, WORLD)
    ledger.restore(VERSION)
    for rank in staged:
        assert ledger.offer(push(rank)) is NEW
    return ledger


@pytest.mark.parametrize(
    ("staged", "push_id", "verdict", "complete", "missing"),
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
    push_id: PushId,
    verdict: Verdict,
    complete: bool,
    missing: list[int],
) -> None:
    ledger = step_ledger(*staged)
    assert ledger.offer(push_id) is verdict
    assert (ledger.complete, ledger.missing(), ledger.version) == (complete, missing, VERSION)


@pytest.mark.parametrize(
    ("push_id", "error", "message"),
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
    push_id: PushId, error: type[ProtocolError], message: str
) -> None:
    ledger = step_ledger(0)
    with pytest.raises(error, match=message):
        ledger.offer(push_id)
    assert (ledger.version, ledger.missing()) == (VERSION, [1, 2])


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
    ledger = step_ledger(*staged)
    with pytest.raises(error, match=f"commit {seq} refused: version is 5"):
        ledger.commit(seq)
    assert (ledger.version, len(ledger.missing())) == (VERSION, WORLD - len(staged))


def test_step_is_committed_once() -> None:
    ledger = step_ledger(0, 1, 2)
    assert ledger.commit(VERSION) is True
    assert (ledger.version, ledger.missing()) == (VERSION + 1, [0, 1, 2])
    assert ledger.offer(push(0, VERSION + 1)) is NEW
    assert ledger.commit(VERSION) is False
    assert (ledger.version, ledger.missing()) == (VERSION + 1, [1, 2])


def test_ledger_without_parameters_is_not_ready() -> None:
    ledger = StepLedger(JOB, ATTEMPT, WORLD)
    with pytest.raises(NotReadyError):
        ledger.offer(push(0, 0))
    with pytest.raises(NotReadyError):
        ledger.commit(0)
    ledger.restore(0)
    assert ledger.offer(push(0, 0)) is NEW


def test_restore_discards_staged_pushes() -> None:
    ledger = step_ledger(0, 1)
    ledger.restore(VERSION)
    assert ledger.missing() == [0, 1, 2]


class RandomHistories(RuleBasedStateMachine):
    """
    A shard that follows the ledger under late, duplicated and reordered messages.

    `applied` has the ranks whose gradients an optimizer would apply in each step: every rank once
    for every step, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attempt, self.world = 0, WORLD
        self.applied: list[list[int]] = []
        self.worlds: list[int] = []  #: number of ranks by step
        self._start()

    def _start(self) -> None:
        self.ledger = StepLedger(JOB, self.attempt, self.world)
        self.ledger.restore(len(self.applied))
        self.staged: list[int] = []

    @rule()
    def replace_worker(self) -> None:
        """The shard survives; all ranks push the staged step again in the next attempt."""
        self.attempt += 1
        self.ledger.renew(self.attempt)
        self.staged.clear()

    @rule(world=st.integers(1, 5))
    def change_world(self, world: int) -> None:
        """A new attempt in which `world` ranks push."""
        self.attempt, self.world = self.attempt + 1, world
        self.ledger.renew(self.attempt, world)
        self.staged.clear()

    @rule(
        rank=st.integers(0, 5),
        ahead=st.sampled_from([0, 0, 0, -1, -2, -3, 1, 2]),
        behind=st.sampled_from([0, 0, 0, 0, 1, 2]),
    )
    def push_arrives(self, rank: int, ahead: int, behind: int) -> None:
        """Offer a push `ahead` steps ahead, of an attempt `behind` the current one."""
        current_step = len(self.applied)
        push_id = push(rank, current_step + ahead, self.attempt - behind)
        if behind or rank >= self.world:
            self._check_refused(FencedError, push_id)
        elif ahead > 0:
            self._check_refused(GapError, push_id)
        elif ahead < -1:
            self._check_refused(StaleError, push_id)
        elif ahead == -1:
            assert self.ledger.offer(push_id) is COMMITTED
        else:
            expected = STAGED if rank in self.staged else NEW
            assert self.ledger.offer(push_id) is expected
            if expected is NEW:
                self.staged.append(rank)

    def _check_refused(self, error: type[ProtocolError], push_id: PushId) -> None:
        with pytest.raises(error):
            self.ledger.offer(push_id)

    @rule(ahead=st.sampled_from([0, 0, 0, -1, -2, 1]))
    def commit_arrives(self, ahead: int) -> None:
        """Commit the current step, a committed one, or one out of order."""
        current_step = len(self.applied)
        if ahead == -1:
            assert self.ledger.commit(current_step - 1) is False
        elif ahead == 0 and len(self.staged) == self.world:
            self._commit()
        else:
            with pytest.raises(StaleError if ahead < 0 else GapError):
                self.ledger.commit(current_step + ahead)

    @precondition(lambda self: len(self.staged) < self.world)
    @rule(order=st.permutations(range(5)))
    def complete_step(self, order: list[int]) -> None:
        """Push the missing gradients in any order and commit: histories reach many steps."""
        for rank in [rank for rank in order if rank < self.world]:
            if self.ledger.offer(push(rank, len(self.applied), self.attempt)) is NEW:
                self.staged.append(rank)
        self._commit()

    def _commit(self) -> None:
        assert self.ledger.commit(len(self.applied)) is True
        self.applied.append(self.staged)
        self.worlds.append(self.world)
        self.staged = []

    @rule()
    def replace_shard(self) -> None:
        """Recover with a new ledger of the next attempt at the committed version."""
        self.attempt += 1
        self._start()

    @invariant()
    def each_gradient_is_applied_once(self) -> None:
        """Every applied step has the gradient of every rank once."""
        for ranks, world in zip(self.applied, self.worlds, strict=True):
            assert sorted(ranks) == list(range(world))
        assert self.ledger.version == len(self.applied)
        assert self.ledger.complete == (len(self.staged) == self.world)
        assert self.ledger.missing() == sorted(set(range(self.world)) - set(self.staged))


TestHistories = RandomHistories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def leased_push(rank: int, seq: int, task: int | None, attempt: int = ATTEMPT) -> PushId:
    return PushId(JOB, attempt, rank, seq, task)


def offer(ledger: TaskLedger, push: PushId) -> Verdict:
    """Offer a push and commit its update, as a server does."""
    verdict = ledger.offer(push)
    assert ledger.complete is (verdict is NEW) and ledger.passed(push)
    assert ledger.commit(push.seq) is (verdict is NEW)
    assert not ledger.complete
    return verdict


def test_first_push_of_a_leased_task_counts() -> None:
    ledger = TaskLedger(JOB, ATTEMPT, 1)
    with pytest.raises(NotReadyError):
        ledger.offer(leased_push(0, 0, 7))
    ledger.restore(6)
    assert offer(ledger, leased_push(0, 0, 7)) is NEW
    assert offer(ledger, leased_push(0, 0, 7)) is COMMITTED
    # A reassigned task whose first rank was not lost.
    assert offer(ledger, leased_push(9, 0, 7)) is Verdict.LATE
    assert offer(ledger, leased_push(9, 0, 7)) is COMMITTED
    assert offer(ledger, leased_push(9, 1, 5)) is Verdict.LATE  # applied before the checkpoint
    assert offer(ledger, leased_push(9, 2, 6)) is NEW
    assert (ledger.version, ledger.applied.low, ledger.dropped) == (8, 8, {9: 2})


@pytest.mark.parametrize(
    ("push_id", "error"),
    [
        (leased_push(0, 0, 9), StaleError),  # superseded by a later push of the worker
        (leased_push(0, -1, 9), StaleError),
        (leased_push(0, 3, 9, attempt=1), FencedError),
        (leased_push(0, 3, 9, attempt=3), FencedError),
        (leased_push(-1, 0, 9), FencedError),
        (leased_push(0, 3, None), FencedError),
    ],
)
def test_refused_pushes_of_leased_tasks(push_id: PushId, error: type[ProtocolError]) -> None:
    ledger = TaskLedger(JOB, ATTEMPT, 1)
    ledger.restore(0)
    for seq in range(3):
        offer(ledger, leased_push(0, seq, seq))
    with pytest.raises(error):
        ledger.offer(push_id)
    assert (ledger.version, ledger.applied.low) == (3, 3)


def test_new_attempt_resets_push_numbers_and_keeps_tasks() -> None:
    ledger = TaskLedger(JOB, ATTEMPT, 1)
    ledger.restore(0)
    offer(ledger, leased_push(0, 0, 0))
    ledger.renew(ATTEMPT + 1)
    assert offer(ledger, leased_push(0, 0, 0, ATTEMPT + 1)) is Verdict.LATE
    assert offer(ledger, leased_push(0, 1, 1, ATTEMPT + 1)) is NEW
    assert ledger.version == 2


def loop_ledger(pushes: tuple[int, ...], bound: int | None = None) -> LoopLedger:
    """Return a ledger of three ranks with the given numbers of pushes."""
    ledger = LoopLedger(JOB, ATTEMPT, 3, bound)
    ledger.restore(0)
    for rank, count in enumerate(pushes):
        for seq in range(count):
            assert ledger.offer(push(rank, seq)) is NEW
            assert ledger.complete
            assert ledger.commit(seq)
    return ledger


@pytest.mark.parametrize(
    ("pushes", "bound", "finished_ranks", "passed", "missing"),
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
def test_push_passes_unless_it_exceeds_the_staleness_bound(
    pushes: tuple[int, ...],
    bound: int | None,
    finished_ranks: tuple[int, ...],
    passed: bool,
    missing: list[int],
) -> None:
    ledger = loop_ledger(pushes, bound)
    ledger.finished_ranks.update(finished_ranks)
    assert ledger.passed(push(0, pushes[0] - 1)) is passed
    assert ledger.missing() == missing
    assert (ledger.updates, ledger.steps) == (sum(pushes), sum(pushes) // 3)


@pytest.mark.parametrize(
    ("push_id", "expected"),
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
def test_push_numbers_of_a_loop_ledger(
    push_id: PushId, expected: Verdict | type[Exception]
) -> None:
    ledger = loop_ledger((2, 0, 0))
    if isinstance(expected, Verdict):
        assert ledger.offer(push_id) is expected
    else:
        with pytest.raises(expected):
            ledger.offer(push_id)
    assert ledger.updates == 2
