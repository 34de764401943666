"""What the controller decides: what each history of news makes of a run."""

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
DEATH = ActorLost("worker-1", 3, "killed")
LATE = DeadlineExceeded("push 3", ("worker-1",), 20, "failure.step_timeout_s")
BROKEN = CollectiveError("g", "all_reduce", 3, (1,), "deadline")
NAN, FULL = NonFiniteError(0, 3, "the loss is NaN"), StorageError("no space left")
APART = MismatchError("g", "all_reduce", 3, (1,), "another shape")

History = Sequence[tuple[float, Event]]


def heard(rank: int, progress: int, step: int = 0, finished: bool = False) -> PollAnswered:
    return PollAnswered(rank, progress, step, finished)


def failed(error: DistplatError) -> Failed:
    return Failed("worker", error)


def play(history: History, world: int = 2) -> JobState:
    state = JobState(world, LIMITS, now=0.0)
    for now, event in history:
        state.handle(event, now)
    return state


STARTED: History = [(0, heard(0, 1)), (0, heard(1, 1))]
END = 1 + SETTLE_S


@pytest.mark.parametrize(
    ("history", "phase"),
    [
        ([], Phase.STARTING),
        ([(1, heard(0, 1))], Phase.STARTING),
        ([(1, heard(0, 0)), (1, heard(1, 3))], Phase.STARTING),
        (STARTED, Phase.RUNNING),
        ([*STARTED, (1, heard(0, 9, 9, True))], Phase.RUNNING),
        ([*STARTED, (1, heard(0, 9, 9, True)), (2, heard(0, 9, 9, True))], Phase.RUNNING),
        ([*STARTED, (1, heard(0, 9, 9, True)), (2, heard(1, 9, 9, True))], Phase.SUCCEEDED),
        ([(1, heard(0, 1, 1, True)), (1, heard(1, 1, 1, True))], Phase.SUCCEEDED),
    ],
)
def test_a_run_without_trouble(history: History, phase: Phase) -> None:
    state = play(history)
    assert (state.phase, state.error) == (phase, None)
    assert state.over == (phase is Phase.SUCCEEDED)


@pytest.mark.parametrize("start", [[], STARTED], ids=["starting", "running"])
@pytest.mark.parametrize(
    ("news", "phase", "error"),
    [
        # the user's own error waits for nothing
        ([(1, failed(USER))], Phase.FAILED, USER),
        ([(1, failed(BROKEN)), (1.5, failed(USER))], Phase.FAILED, USER),
        ([(1, failed(DEATH)), (1.5, failed(USER))], Phase.FAILED, USER),
        # others wait for a better explanation
        ([(1, failed(BROKEN))], Phase.SETTLING, BROKEN),
        ([(1, failed(BROKEN)), (END - 0.1, Tick())], Phase.SETTLING, BROKEN),
        ([(1, failed(BROKEN)), (END, Tick())], Phase.FAILED, BROKEN),
        ([(1, failed(DEATH)), (END, Tick())], Phase.FAILED, DEATH),
        # a death explains what broke, whichever was heard first
        ([(1, failed(BROKEN)), (2, failed(DEATH)), (END, Tick())], Phase.FAILED, DEATH),
        ([(1, failed(DEATH)), (2, failed(BROKEN)), (END, Tick())], Phase.FAILED, DEATH),
        ([(1, failed(LATE)), (2, failed(DEATH)), (END, Tick())], Phase.FAILED, DEATH),
        ([(1, failed(BROKEN)), (2, failed(LATE)), (END, Tick())], Phase.FAILED, LATE),
        # so does what ends a rank by itself, or what ranks did that do not match
        ([(1, failed(BROKEN)), (2, failed(NAN)), (END, Tick())], Phase.FAILED, NAN),
        ([(1, failed(DEATH)), (2, failed(FULL)), (END, Tick())], Phase.FAILED, FULL),
        ([(1, failed(NAN)), (2, failed(BROKEN)), (END, Tick())], Phase.FAILED, NAN),
        ([(1, failed(BROKEN)), (2, failed(APART)), (END, Tick())], Phase.FAILED, APART),
        # of two alike the first counts, and a second failure buys no more time
        ([(1, failed(DEATH)), (2, failed(ActorLost("b", 3, "x")))], Phase.SETTLING, DEATH),
        ([(1, failed(BROKEN)), (END - 0.1, failed(LATE)), (END, Tick())], Phase.FAILED, LATE),
        # too late
        ([(1, failed(BROKEN)), (END, Tick()), (END, failed(USER))], Phase.FAILED, BROKEN),
        # who finishes meanwhile does not make it good
        (
            [(1, failed(BROKEN)), (2, heard(0, 9, 9, True)), (2, heard(1, 9, 9, True))],
            Phase.SETTLING,
            BROKEN,
        ),
    ],
)
def test_which_error_explains_a_failed_run(
    start: History, news: History, phase: Phase, error: DistplatError
) -> None:
    state = play([*start, *news])
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
        ([(5, heard(1, 1))], ("worker-0", "worker-2")),
        ([(5, heard(0, 7)), (5, heard(1, 1)), (59, heard(2, 0))], ("worker-2",)),
    ],
)
def test_the_start_deadline_names_late_workers(history: History, late: tuple[str, ...]) -> None:
    assert play([*history, (60.0, Tick())], world=3).phase is Phase.STARTING
    error = deadline(play([*history, (60.1, Tick())], world=3))
    assert (error.missing, error.seconds, error.setting) == (late, 60, "failure.start_timeout_s")


def test_a_run_that_started_has_no_start_deadline() -> None:
    history: History = [*STARTED, (100, heard(0, 2)), (100, heard(1, 2)), (101, Tick())]
    assert play(history).phase is Phase.RUNNING


@pytest.mark.parametrize(
    ("history", "stalled"),
    [
        ([], ("worker-0", "worker-1")),
        ([(9, heard(0, 2, 1))], ("worker-1",)),
        ([(9, heard(0, 1, 0)), (9, heard(1, 2, 1))], ("worker-0",)),  # answers, but does nothing
        ([(9, heard(0, 2, 1, finished=True))], ("worker-1",)),
    ],
)
def test_a_stall_names_the_stalled(history: History, stalled: tuple[str, ...]) -> None:
    assert play([*STARTED, *history, (STALL, Tick())]).phase is Phase.RUNNING
    error = deadline(play([*STARTED, *history, (STALL + 0.1, Tick())]))
    assert (error.missing, error.seconds, error.setting) == (stalled, 20, "failure.step_timeout_s")


def test_a_finished_rank_does_not_stall() -> None:
    finished = heard(0, 2, 1, finished=True)
    history: History = [*STARTED, (1, finished), (50, heard(1, 2)), (60, Tick())]
    assert play(history).phase is Phase.RUNNING


@pytest.mark.parametrize(("seconds", "lost"), [(9.9, False), (10.0, False), (10.1, True)])
def test_a_frozen_process_is_lost(seconds: float, lost: bool) -> None:
    started: History = [(1, heard(0, 5, 4)), (1, heard(1, 4, 3))]
    state = play([*started, (2, PollUnanswered("server-0", seconds))])
    assert state.phase is (Phase.SETTLING if lost else Phase.RUNNING)
    if lost:
        assert isinstance(state.error, ActorLost)
        assert (state.error.role, state.error.step) == ("server-0", 3)
        assert "failure.heartbeat_timeout_s" in str(state.error)
        assert "10 s" in str(state.error)


@pytest.mark.parametrize(
    "end",
    [
        [(1, heard(0, 9, 9, True)), (1, heard(1, 9, 9, True))],
        [(1, failed(USER))],
        [(1, failed(DEATH)), (END, Tick())],
    ],
    ids=["succeeded", "user", "lost"],
)
def test_nothing_comes_after_the_end(end: History) -> None:
    state = play([*STARTED, *end])
    before = (state.phase, state.error, state.steps_done)
    for event in (failed(USER), failed(BROKEN), PollUnanswered("x", 1e9), Tick(), heard(0, 99, 99)):
        state.handle(event, 1e9)
    assert (state.phase, state.error, state.steps_done) == before


def test_steps_done_is_the_slowest_rank() -> None:
    assert play([(1, heard(0, 9, 7)), (1, heard(1, 9, 5))]).steps_done == 5


DONE = {rank: heard(rank, 9, 9, finished=True) for rank in range(3)}


@pytest.mark.parametrize(
    ("history", "phase"),
    [
        # one that joins must finish too, unless it leaves
        ([(1, Joined(2)), (2, DONE[0]), (2, DONE[1])], Phase.RUNNING),
        ([(1, Joined(2)), (2, DONE[0]), (2, DONE[1]), (3, DONE[2])], Phase.SUCCEEDED),
        ([(1, Joined(2)), (2, DONE[0]), (2, DONE[1]), (3, Left(2))], Phase.SUCCEEDED),
        ([(1, Left(1)), (2, heard(1, 9, 9, True)), (2, heard(0, 5, 5))], Phase.RUNNING),
        ([(1, Left(1)), (2, DONE[0])], Phase.SUCCEEDED),
        # it has the time of a start before its first step, and that of a step afterwards
        ([(1, Joined(2)), (60, heard(0, 2)), (60, heard(1, 2)), (75, Tick())], Phase.RUNNING),
        ([(1, Joined(2)), (76, heard(0, 2)), (76, heard(1, 2)), (77, Tick())], Phase.SETTLING),
        (
            [(1, Joined(2)), (9, heard(2, 1)), *((34, heard(r, 2)) for r in (0, 1)), (35, Tick())],
            Phase.SETTLING,
        ),
    ],
)
def test_workers_join_and_leave(history: History, phase: Phase) -> None:
    assert play([*STARTED, *history]).phase is phase


def test_who_has_left_is_not_replaced_and_who_has_joined_is() -> None:
    policy = Policy(max_failures=1, survives_worker_loss=True)
    state = JobState(2, LIMITS, 0.0, policy)
    lost = Failed("worker-5", DEATH, dead=True)
    waits = Failed("worker-0", BROKEN)
    history: list[Event] = [heard(0, 1), heard(1, 1), Joined(5), Left(1), heard(5, 1), lost, waits]
    for event in [*history, Tick()]:
        state.handle(event, 1.0)
    assert state.restart is not None
    assert (state.restart.replace, state.restart.restarts_all) == ((5,), False)
