"""Decisions of the controller: the state of a run after each history of events."""

from collections.abc import Sequence

import pytest

from distplat.platform.errors import (
    ActorLost,
    CollectiveError,
    DeadlineExceeded,
    DistplatError,
    MismatchError,
    NonFiniteError,
    StorageError,
    UserCodeError,
)
from distplat.platform.job import (
    SETTLE_S,
    STALL_GRACE,
    Event,
    Failed,
    JobState,
    Joined,
    Left,
    Phase,
    PollAnswered,
    PollUnanswered,
    Tick,
)
from distplat.platform.recovery import Policy
from distplat.platform.spec import Failure

LIMITS = Failure(start_timeout_s=60, step_timeout_s=20, heartbeat_timeout_s=10)
STALL = 20 * STALL_GRACE

USER = UserCodeError(1, 3, "ValueError: no", "Traceback")
LOST = ActorLost("worker-1", 3, "killed")
TIMEOUT = DeadlineExceeded("push 3", ("worker-1",), 20, "failure.step_timeout_s")
COLLECTIVE = CollectiveError("g", "all_reduce", 3, (1,), "deadline")
NAN, DISK = NonFiniteError(0, 3, "the loss is NaN"), StorageError("no space left")
MISMATCH = MismatchError("g", "all_reduce", 3, (1,), "another shape")

History = Sequence[tuple[float, Event]]


def answer(rank: int, progress: int, step: int = 0, finished: bool = False) -> PollAnswered:
    return PollAnswered(rank, progress, step, finished)


def failed(error: DistplatError) -> Failed:
    return Failed("worker", error)


def replay(history: History, world: int = 2) -> JobState:
    state = JobState(world, LIMITS, now=0.0)
    for now, event in history:
        state.handle(event, now)
    return state


STARTED: History = [(0, answer(0, 1)), (0, answer(1, 1))]
SETTLED = 1 + SETTLE_S


@pytest.mark.parametrize(
    ("history", "phase"),
    [
        ([], Phase.STARTING),
        ([(1, answer(0, 1))], Phase.STARTING),
        ([(1, answer(0, 0)), (1, answer(1, 3))], Phase.STARTING),
        (STARTED, Phase.RUNNING),
        ([*STARTED, (1, answer(0, 9, 9, True))], Phase.RUNNING),
        ([*STARTED, (1, answer(0, 9, 9, True)), (2, answer(0, 9, 9, True))], Phase.RUNNING),
        ([*STARTED, (1, answer(0, 9, 9, True)), (2, answer(1, 9, 9, True))], Phase.SUCCEEDED),
        ([(1, answer(0, 1, 1, True)), (1, answer(1, 1, 1, True))], Phase.SUCCEEDED),
    ],
)
def test_phases_without_a_failure(history: History, phase: Phase) -> None:
    state = replay(history)
    assert (state.phase, state.error) == (phase, None)
    assert state.over == (phase is Phase.SUCCEEDED)


@pytest.mark.parametrize("start", [[], STARTED], ids=["starting", "running"])
@pytest.mark.parametrize(
    ("events", "phase", "error"),
    [
        # a user error fails the run at once
        ([(1, failed(USER))], Phase.FAILED, USER),
        ([(1, failed(COLLECTIVE)), (1.5, failed(USER))], Phase.FAILED, USER),
        ([(1, failed(LOST)), (1.5, failed(USER))], Phase.FAILED, USER),
        # other errors wait for a better explanation
        ([(1, failed(COLLECTIVE))], Phase.SETTLING, COLLECTIVE),
        ([(1, failed(COLLECTIVE)), (SETTLED - 0.1, Tick())], Phase.SETTLING, COLLECTIVE),
        ([(1, failed(COLLECTIVE)), (SETTLED, Tick())], Phase.FAILED, COLLECTIVE),
        ([(1, failed(LOST)), (SETTLED, Tick())], Phase.FAILED, LOST),
        # a lost process explains a broken collective, whichever is reported first
        ([(1, failed(COLLECTIVE)), (2, failed(LOST)), (SETTLED, Tick())], Phase.FAILED, LOST),
        ([(1, failed(LOST)), (2, failed(COLLECTIVE)), (SETTLED, Tick())], Phase.FAILED, LOST),
        ([(1, failed(TIMEOUT)), (2, failed(LOST)), (SETTLED, Tick())], Phase.FAILED, LOST),
        ([(1, failed(COLLECTIVE)), (2, failed(TIMEOUT)), (SETTLED, Tick())], Phase.FAILED, TIMEOUT),
        # so do errors that end a rank, and mismatched collectives
        ([(1, failed(COLLECTIVE)), (2, failed(NAN)), (SETTLED, Tick())], Phase.FAILED, NAN),
        ([(1, failed(LOST)), (2, failed(DISK)), (SETTLED, Tick())], Phase.FAILED, DISK),
        ([(1, failed(NAN)), (2, failed(COLLECTIVE)), (SETTLED, Tick())], Phase.FAILED, NAN),
        (
            [(1, failed(COLLECTIVE)), (2, failed(MISMATCH)), (SETTLED, Tick())],
            Phase.FAILED,
            MISMATCH,
        ),
        # of two equal errors the first counts; a second failure does not extend the wait
        ([(1, failed(LOST)), (2, failed(ActorLost("b", 3, "x")))], Phase.SETTLING, LOST),
        (
            [(1, failed(COLLECTIVE)), (SETTLED - 0.1, failed(TIMEOUT)), (SETTLED, Tick())],
            Phase.FAILED,
            TIMEOUT,
        ),
        # after the end
        (
            [(1, failed(COLLECTIVE)), (SETTLED, Tick()), (SETTLED, failed(USER))],
            Phase.FAILED,
            COLLECTIVE,
        ),
        # ranks that finish meanwhile do not undo the failure
        (
            [(1, failed(COLLECTIVE)), (2, answer(0, 9, 9, True)), (2, answer(1, 9, 9, True))],
            Phase.SETTLING,
            COLLECTIVE,
        ),
    ],
)
def test_reported_error_of_a_failed_run(
    start: History, events: History, phase: Phase, error: DistplatError
) -> None:
    state = replay([*start, *events])
    assert state.phase is phase
    assert state.error is error
    assert state.over == (phase is Phase.FAILED)


def deadline(state: JobState) -> DeadlineExceeded:
    assert state.phase is Phase.SETTLING
    assert isinstance(state.error, DeadlineExceeded)
    return state.error


@pytest.mark.parametrize(
    ("history", "late"),
    [
        ([], ("worker-0", "worker-1", "worker-2")),
        ([(5, answer(1, 1))], ("worker-0", "worker-2")),
        ([(5, answer(0, 7)), (5, answer(1, 1)), (59, answer(2, 0))], ("worker-2",)),
    ],
)
def test_start_timeout_names_missing_workers(history: History, late: tuple[str, ...]) -> None:
    assert replay([*history, (60.0, Tick())], world=3).phase is Phase.STARTING
    error = deadline(replay([*history, (60.1, Tick())], world=3))
    assert (error.missing, error.seconds, error.setting) == (late, 60, "failure.start_timeout_s")


def test_start_timeout_ends_with_the_start() -> None:
    history: History = [*STARTED, (100, answer(0, 2)), (100, answer(1, 2)), (101, Tick())]
    assert replay(history).phase is Phase.RUNNING


@pytest.mark.parametrize(
    ("history", "stalled"),
    [
        ([], ("worker-0", "worker-1")),
        ([(9, answer(0, 2, 1))], ("worker-1",)),
        (
            [(9, answer(0, 1, 0)), (9, answer(1, 2, 1))],
            ("worker-0",),
        ),  # answers polls without progress
        ([(9, answer(0, 2, 1, finished=True))], ("worker-1",)),
    ],
)
def test_step_timeout_names_stalled_workers(history: History, stalled: tuple[str, ...]) -> None:
    assert replay([*STARTED, *history, (STALL, Tick())]).phase is Phase.RUNNING
    error = deadline(replay([*STARTED, *history, (STALL + 0.1, Tick())]))
    assert (error.missing, error.seconds, error.setting) == (stalled, 20, "failure.step_timeout_s")


def test_finished_rank_has_no_step_timeout() -> None:
    finished = answer(0, 2, 1, finished=True)
    history: History = [*STARTED, (1, finished), (50, answer(1, 2)), (60, Tick())]
    assert replay(history).phase is Phase.RUNNING


@pytest.mark.parametrize(("seconds", "lost"), [(9.9, False), (10.0, False), (10.1, True)])
def test_frozen_process_is_lost(seconds: float, lost: bool) -> None:
    started: History = [(1, answer(0, 5, 4)), (1, answer(1, 4, 3))]
    state = replay([*started, (2, PollUnanswered("server-0", seconds))])
    assert state.phase is (Phase.SETTLING if lost else Phase.RUNNING)
    if lost:
        assert isinstance(state.error, ActorLost)
        assert (state.error.role, state.error.step) == ("server-0", 3)
        assert "failure.heartbeat_timeout_s" in str(state.error)
        assert "10 s" in str(state.error)


@pytest.mark.parametrize(
    "end",
    [
        [(1, answer(0, 9, 9, True)), (1, answer(1, 9, 9, True))],
        [(1, failed(USER))],
        [(1, failed(LOST)), (SETTLED, Tick())],
    ],
    ids=["succeeded", "user", "lost"],
)
def test_events_after_the_end_are_ignored(end: History) -> None:
    state = replay([*STARTED, *end])
    before = (state.phase, state.error, state.steps_done)
    for event in (
        failed(USER),
        failed(COLLECTIVE),
        PollUnanswered("x", 1e9),
        Tick(),
        answer(0, 99, 99),
    ):
        state.handle(event, 1e9)
    assert (state.phase, state.error, state.steps_done) == before


def test_steps_done_is_that_of_the_slowest_rank() -> None:
    assert replay([(1, answer(0, 9, 7)), (1, answer(1, 9, 5))]).steps_done == 5


FINISHED = {rank: answer(rank, 9, 9, finished=True) for rank in range(3)}


@pytest.mark.parametrize(
    ("history", "phase"),
    [
        # a joined worker must finish, unless it leaves
        ([(1, Joined(2)), (2, FINISHED[0]), (2, FINISHED[1])], Phase.RUNNING),
        ([(1, Joined(2)), (2, FINISHED[0]), (2, FINISHED[1]), (3, FINISHED[2])], Phase.SUCCEEDED),
        ([(1, Joined(2)), (2, FINISHED[0]), (2, FINISHED[1]), (3, Left(2))], Phase.SUCCEEDED),
        ([(1, Left(1)), (2, answer(1, 9, 9, True)), (2, answer(0, 5, 5))], Phase.RUNNING),
        ([(1, Left(1)), (2, FINISHED[0])], Phase.SUCCEEDED),
        # the start timeout applies until its first step, then the step timeout
        ([(1, Joined(2)), (60, answer(0, 2)), (60, answer(1, 2)), (75, Tick())], Phase.RUNNING),
        ([(1, Joined(2)), (76, answer(0, 2)), (76, answer(1, 2)), (77, Tick())], Phase.SETTLING),
        (
            [
                (1, Joined(2)),
                (9, answer(2, 1)),
                *((34, answer(r, 2)) for r in (0, 1)),
                (35, Tick()),
            ],
            Phase.SETTLING,
        ),
    ],
)
def test_workers_join_and_leave(history: History, phase: Phase) -> None:
    assert replay([*STARTED, *history]).phase is phase


def test_joined_worker_is_replaced_and_a_worker_that_left_is_not() -> None:
    policy = Policy(max_failures=1, survives_worker_loss=True)
    state = JobState(2, LIMITS, 0.0, policy)
    lost = Failed("worker-5", LOST, dead=True)
    stopped = Failed("worker-0", COLLECTIVE)
    history: list[Event] = [
        answer(0, 1),
        answer(1, 1),
        Joined(5),
        Left(1),
        answer(5, 1),
        lost,
        stopped,
    ]
    for event in [*history, Tick()]:
        state.handle(event, 1.0)
    assert state.restart is not None
    assert (state.restart.replace, state.restart.restarts_all) == ((5,), False)
