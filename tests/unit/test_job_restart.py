"""Decisions of the controller about restarts after failures."""

from collections.abc import Sequence

import pytest

from distplat.platform.errors import (
    ActorLost,
    CollectiveError,
    DeadlineExceeded,
    DistplatError,
    MismatchError,
    RestartsExhausted,
    StateLost,
    UserCodeError,
)
from distplat.platform.job import (
    SETTLE_S,
    STALL_GRACE,
    Event,
    Failed,
    JobState,
    Phase,
    PollAnswered,
    PollUnanswered,
    Tick,
)
from distplat.platform.recovery import Policy, Restart
from distplat.platform.spec import Failure

LIMITS = Failure(start_timeout_s=60, step_timeout_s=20, heartbeat_timeout_s=10)
RECOVERABLE = Policy(max_failures=3, max_preemptions=1, survives_worker_loss=True)
NOT_RECOVERABLE = Policy(max_failures=3, survives_worker_loss=False)

COLLECTIVE = CollectiveError("g", "all_reduce", 3, (1,), "deadline")
History = Sequence[tuple[float, Event]]


def dead(rank: int, preempted: bool = False) -> Failed:
    role = f"worker-{rank}"
    return Failed(role, ActorLost(role, 3, "killed"), dead=True, preempted=preempted)


def stopped(rank: int, error: DistplatError = COLLECTIVE) -> Failed:
    return Failed(f"worker-{rank}", error)


def answer(rank: int, step: int = 3, finished: bool = False) -> PollAnswered:
    return PollAnswered(rank, step + 1, step, finished)


MANAGER_LOST = Failed("server-manager", ActorLost("server-manager", 3, "killed"), dead=True)
STARTED: History = [(0, answer(rank)) for rank in range(3)]


def replay(history: History, policy: Policy = RECOVERABLE) -> JobState:
    state = JobState(3, LIMITS, 0.0, policy)
    for now, event in [*STARTED, *history]:
        state.handle(event, now)
    return state


@pytest.mark.parametrize(
    ("history", "replace"),
    [
        ([(1, dead(1)), (1, stopped(0)), (1, stopped(2)), (1, Tick())], (1,)),
        ([(1, stopped(2)), (1, stopped(0)), (1.5, dead(1)), (1.5, Tick())], (1,)),
        ([(1, dead(0)), (1, dead(2)), (1, stopped(1)), (1, Tick())], (0, 2)),
        # only the network failed: no worker is replaced
        ([(1, stopped(0)), (1, stopped(1)), (1, stopped(2)), (1, Tick())], ()),
        # a finished worker stays
        ([(1, answer(0, 9, True)), (1, dead(1)), (1, stopped(2)), (1, Tick())], (1,)),
        # frozen: its peers timed out, and it does not answer polls
        (
            [
                (1, stopped(0)),
                (1, stopped(2)),
                (2, PollUnanswered("worker-1", SETTLE_S)),
                (2, Tick()),
                (3, PollUnanswered("worker-1", SETTLE_S + 0.1)),
                (3, Tick()),
            ],
            (1,),
        ),
        # busy in user code for longer than the step timeout
        ([(1, dead(0)), (1, stopped(1)), (1.1 + 20 * STALL_GRACE, Tick())], (0, 2)),
    ],
)
def test_replaced_ranks(history: History, replace: tuple[int, ...]) -> None:
    state = replay(history)
    assert state.restart == Restart(1, replace, restarts_all=False, wait_s=0.0)
    assert not state.over
    before = replay(history[:-1])
    assert before.restart is None, "decided before every rank had stopped or was lost"


def test_restart_waits_for_a_busy_rank() -> None:
    history: History = [(1, dead(0)), (1, stopped(1)), (1 + 20 * STALL_GRACE - 0.1, Tick())]
    state = replay(history)
    assert (state.phase, state.restart) == (Phase.SETTLING, None)
    state.handle(stopped(2), 26)
    state.handle(Tick(), 26)
    assert state.restart is not None
    assert state.restart.replace == (0,)


@pytest.mark.parametrize(
    ("history", "policy"),
    [
        ([(1, dead(0)), (1, dead(1)), (1, dead(2)), (1, Tick())], RECOVERABLE),
        ([(1, dead(1)), (1 + SETTLE_S, Tick())], NOT_RECOVERABLE),
        (
            [(1, Failed("server-manager", ActorLost("server-0", 3, "x"))), (4, Tick())],
            NOT_RECOVERABLE,
        ),
    ],
    ids=["all workers lost", "survivors cannot continue", "server lost"],
)
def test_all_ranks_restart(history: History, policy: Policy) -> None:
    state = replay(history, policy)
    assert state.restart == Restart(1, (0, 1, 2), restarts_all=True, wait_s=0.0)
    assert state.steps_done == 3
    state.restarted(5)
    assert (state.phase, state.steps_done, state.attempt) == (Phase.STARTING, 0, 1)


def test_all_ranks_restart_if_survivors_lack_state() -> None:
    """All ranks are alive, but a part of the state has no holder."""
    lost = StateLost("the state after step 10")
    state = replay(
        [(1, stopped(0, lost)), (1, stopped(1, lost)), (1, stopped(2, lost)), (1, Tick())]
    )
    assert state.restart == Restart(1, (0, 1, 2), restarts_all=True, wait_s=0.0)
    state.restarted(2, step=10)
    assert (state.steps_done, state.max_step) == (10, 10)
    lose_rank_1(state, 3, 12)
    assert state.restart is not None
    assert not state.restart.restarts_all, "the lost state was that of the previous attempt"


def test_second_loss_at_the_same_step_restarts_from_the_checkpoint() -> None:
    """The second loss occurs during recovery of the first: no rank has the state."""
    state = replay([])
    for now in (1, 3):
        lose_rank_1(state, now, 12)
        state.restarted(now + 1)
    lost = StateLost("the state after step 10")
    for rank in range(3):
        state.handle(stopped(rank, lost), 5)
    state.handle(Tick(), 5)
    assert state.phase is not Phase.FAILED, state.error
    assert state.restart is not None
    assert state.restart.restarts_all


def test_losses_of_one_node_reported_one_by_one_are_recoverable() -> None:
    """Ray starts the new manager on the lost node before it detects the loss."""
    state = replay([])
    cause = "The actor died because its node has died. Node Id: 8dd1bf"
    lost_roles = ["server-manager", "server-0", "server-1", "server-manager"]
    lose_rank_1(state, 0, 12)
    for now, role in enumerate(lost_roles):
        state.restarted(now + 0.1)
        state.handle(Failed(role, ActorLost(role, 12, cause), dead=True), now + 0.2)
        for rank in range(3):
            state.handle(stopped(rank), now + 0.3)
        state.handle(Tick(), now + 0.4)
        assert state.phase is not Phase.FAILED, state.error
        assert state.restart is not None


@pytest.mark.parametrize("lost", [dead(1), MANAGER_LOST])
@pytest.mark.parametrize("resumed", [True, False])
def test_loss_before_all_ranks_run_reloads_the_checkpoint(resumed: bool, lost: Failed) -> None:
    """Survivors may have the model of the checkpoint without its optimizer or tables."""
    state = JobState(3, LIMITS, 0.0, RECOVERABLE, step=10)
    if not resumed:
        state = replay([(1, dead(0)), (1, dead(1)), (1, dead(2)), (1, Tick())])
        state.restarted(2, step=10)
    events: History = [
        (3.0, answer(0, 10)),
        (3.0, lost),
        *((3.0, stopped(rank)) for rank in (0, 2)),
    ]
    for now, event in [*events, (3.0, stopped(1)), (3.0, Tick())]:
        state.handle(event, now)
    assert state.restart is not None
    assert (state.restart.restarts_all, state.restart.replace) == (True, (0, 1, 2))
    state.restarted(4, step=10)
    lose_rank_1(state, 5, 12)
    assert state.restart is not None
    assert not state.restart.restarts_all, "all ranks were running"


SERVER_LOST = ActorLost("server-0", 3, "killed")


@pytest.mark.parametrize("first", [Failed("server-manager", SERVER_LOST), stopped(2, SERVER_LOST)])
@pytest.mark.parametrize("allows_restart_from_scratch", [True, False])
def test_lost_server_restarts_from_scratch_only_if_allowed(
    first: Failed, allows_restart_from_scratch: bool
) -> None:
    """The manager or a worker may report the loss first."""
    policy = Policy(
        max_failures=3,
        survives_worker_loss=True,
        allows_restart_from_scratch=allows_restart_from_scratch,
    )
    other_events: list[Event] = [*(stopped(rank, SERVER_LOST) for rank in range(3)), Tick()]
    state = replay(
        [(1, first), *((1, event) for event in other_events), (1 + SETTLE_S, Tick())], policy
    )
    if allows_restart_from_scratch:
        assert state.restart == Restart(1, (0, 1, 2), restarts_all=True, wait_s=0.0)
    else:
        assert (state.phase, state.error) == (Phase.FAILED, SERVER_LOST)


def lost_coordinator(role: str) -> Failed:
    return Failed(role, ActorLost(role, 3, "killed"), dead=True)


@pytest.mark.parametrize(
    ("history", "coordinators"),
    [
        ([(1, lost_coordinator("server-manager"))], ("server-manager",)),
        # a worker reports the loss before the controller
        (
            [
                (1, stopped(0, ActorLost("task-scheduler", 3, "x"))),
                (1, lost_coordinator("task-scheduler")),
            ],
            ("task-scheduler",),
        ),
        # both frozen
        (
            [(1, PollUnanswered("server-manager", 99)), (1, PollUnanswered("task-scheduler", 99))],
            ("server-manager", "task-scheduler"),
        ),
    ],
)
def test_lost_coordinator_is_replaced_without_a_restart_of_all(
    history: History, coordinators: tuple[str, ...]
) -> None:
    stops: History = [(1, stopped(rank)) for rank in range(3)]
    state = replay([*history, *stops, (1, Tick())])
    assert state.restart == Restart(1, (), False, 0.0, coordinators)
    state = replay([*history, (1, dead(1)), *stops, (1, Tick())])
    assert state.restart == Restart(1, (1,), False, 0.0, coordinators)
    state = replay([*history, (1, stopped(2, SERVER_LOST)), *stops, (1, Tick())])
    assert state.restart == Restart(1, (0, 1, 2), restarts_all=True, wait_s=0.0)


def lose_rank_1(state: JobState, now: float, step: int) -> None:
    """Let all ranks reach `step`, then lose rank 1."""
    for rank in range(3):
        state.handle(answer(rank, step), now)
    for event in (dead(1), stopped(0), stopped(2), Tick()):
        state.handle(event, now)


def test_deadlines_apply_after_a_restart() -> None:
    state = replay([])
    lose_rank_1(state, 1, 3)
    state.handle(Tick(), 50)
    assert state.restart is not None, "the decision stays until the restart was carried out"
    state.restarted(50)
    assert (state.phase.value, state.error, state.attempt) == ("starting", None, 1)
    state.handle(Tick(), 109)
    assert state.error is None
    state.handle(answer(0), 109)
    state.handle(answer(2), 109)
    state.handle(Tick(), 111)
    assert isinstance(state.error, DeadlineExceeded)
    assert state.error.missing == ("worker-1",)
    state.handle(Tick(), 111 + SETTLE_S)
    assert state.phase is Phase.FAILED, "a start timeout is not retried"


def test_exhausted_budget_reports_all_failures() -> None:
    state = replay([])
    for attempt, step in enumerate((3, 5, 8)):
        lose_rank_1(state, attempt, step)
        state.restarted(attempt)
    lose_rank_1(state, 9, 9)
    assert state.phase is Phase.FAILED
    assert isinstance(state.error, RestartsExhausted)
    assert len(state.error.failures) == 4
    assert "max_failures` is 3" in str(state.error)
    assert "after step 8: worker-1 was lost" in str(state.error)


def test_crash_loop_backs_off_then_fails() -> None:
    state = replay([], Policy(max_failures=99, survives_worker_loss=True))
    waits = []
    for attempt in range(2):
        lose_rank_1(state, attempt, 7)
        assert state.restart is not None
        waits.append(state.restart.wait_s)
        state.restarted(attempt)
    lose_rank_1(state, 9, 7)
    assert waits == [0.0, 1.0]
    assert isinstance(state.error, RestartsExhausted)


def test_preemption_does_not_count_as_a_failure() -> None:
    policy = Policy(max_failures=0, max_preemptions=1, survives_worker_loss=True)
    events: History = [(1, dead(1, preempted=True)), (1, stopped(0)), (1, stopped(2)), (1, Tick())]
    assert replay(events, policy).restart is not None
    assert replay([(1, dead(1)), *events[1:]], policy).restart is None


@pytest.mark.parametrize(
    "error",
    [
        UserCodeError(1, 3, "ValueError: no", "Traceback"),
        MismatchError("g", "all_reduce", 3, (1,), "rank 1 is in broadcast"),
        DistplatError("unforeseen"),
    ],
)
def test_unrecoverable_errors_end_the_run(error: DistplatError) -> None:
    events: History = [(1, stopped(1, error)), (1, stopped(0, error)), (1, stopped(2, error))]
    state = replay([*events, (1 + SETTLE_S, Tick())])
    assert (state.phase, state.error, state.restart) == (Phase.FAILED, error, None)


def test_user_error_during_recovery_ends_the_run() -> None:
    user = UserCodeError(2, 3, "ValueError: no", "Traceback")
    state = replay([(1, dead(1)), (1, stopped(0)), (1.5, stopped(2, user))])
    assert (state.phase, state.error) == (Phase.FAILED, user)


@pytest.mark.parametrize(
    ("lost", "holders", "restarts_all"),
    [
        ((0,), ((0, 2), (1,)), False),  # its peer has the same part
        ((1,), ((0, 2), (1,)), True),  # no other rank has that part
        ((0, 2), ((0, 2), (1,)), True),
        ((0, 1), ((0, 1, 2),), False),
    ],
)
def test_a_holder_of_each_part_must_survive(
    lost: tuple[int, ...], holders: tuple[tuple[int, ...], ...], restarts_all: bool
) -> None:
    policy = Policy(max_failures=3, survives_worker_loss=True, holders=holders)
    events = [(1.0, dead(rank) if rank in lost else stopped(rank)) for rank in range(3)]
    state = replay([*events, (1, Tick())], policy)
    replaced = tuple(range(3)) if restarts_all else lost
    assert state.restart == Restart(1, replaced, restarts_all, wait_s=0.0)
