"""What the controller decides when a run may go on after failures."""

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
GO_ON = Policy(max_failures=3, max_preemptions=1, survives_worker_loss=True)
ANEW = Policy(max_failures=3, survives_worker_loss=False)

BROKEN = CollectiveError("g", "all_reduce", 3, (1,), "deadline")
History = Sequence[tuple[float, Event]]


def dead(rank: int, preempted: bool = False) -> Failed:
    role = f"worker-{rank}"
    return Failed(role, ActorLost(role, 3, "killed"), dead=True, preempted=preempted)


def stopped(rank: int, error: DistplatError = BROKEN) -> Failed:
    return Failed(f"worker-{rank}", error)


def heard(rank: int, step: int = 3, finished: bool = False) -> PollAnswered:
    return PollAnswered(rank, step + 1, step, finished)


MANAGER_LOST = Failed("server-manager", ActorLost("server-manager", 3, "killed"), dead=True)
STARTED: History = [(0, heard(rank)) for rank in range(3)]


def play(history: History, policy: Policy = GO_ON) -> JobState:
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
        # a network that failed alone: nobody is replaced
        ([(1, stopped(0)), (1, stopped(1)), (1, stopped(2)), (1, Tick())], ()),
        # who had finished waits for orders, too
        ([(1, heard(0, 9, True)), (1, dead(1)), (1, stopped(2)), (1, Tick())], (1,)),
        # frozen: its peers ran out of time, and it has not answered since
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
        # busy in the user's code for longer than a step may take
        ([(1, dead(0)), (1, stopped(1)), (1.1 + 20 * STALL_GRACE, Tick())], (0, 2)),
    ],
)
def test_who_is_replaced(history: History, replace: tuple[int, ...]) -> None:
    state = play(history)
    assert state.restart == Restart(1, replace, restarts_all=False, wait_s=0.0)
    assert not state.over
    before = play(history[:-1])
    assert before.restart is None, "decided before everybody was accounted for"


def test_a_busy_rank_is_waited_for() -> None:
    history: History = [(1, dead(0)), (1, stopped(1)), (1 + 20 * STALL_GRACE - 0.1, Tick())]
    state = play(history)
    assert (state.phase, state.restart) == (Phase.SETTLING, None)
    state.handle(stopped(2), 26)
    state.handle(Tick(), 26)
    assert state.restart is not None
    assert state.restart.replace == (0,)


@pytest.mark.parametrize(
    ("history", "policy"),
    [
        ([(1, dead(0)), (1, dead(1)), (1, dead(2)), (1, Tick())], GO_ON),
        ([(1, dead(1)), (1 + SETTLE_S, Tick())], ANEW),
        ([(1, Failed("server-manager", ActorLost("server-0", 3, "x"))), (4, Tick())], ANEW),
    ],
    ids=["nobody is left", "survivors are of no use", "a server was lost"],
)
def test_all_begin_anew(history: History, policy: Policy) -> None:
    state = play(history, policy)
    assert state.restart == Restart(1, (0, 1, 2), restarts_all=True, wait_s=0.0)
    assert state.steps_done == 3
    state.restarted(5)
    assert (state.phase, state.steps_done, state.attempt) == (Phase.STARTING, 0, 1)


def test_survivors_that_lack_state_go_back_too() -> None:
    """All are there and wait, but who had a part of the state is gone."""
    lost = StateLost("the state after step 10")
    state = play([(1, stopped(0, lost)), (1, stopped(1, lost)), (1, stopped(2, lost)), (1, Tick())])
    assert state.restart == Restart(1, (0, 1, 2), restarts_all=True, wait_s=0.0)
    state.restarted(2, step=10)
    assert (state.steps_done, state.max_step) == (10, 10)
    lose(state, 3, 12)
    assert state.restart is not None
    assert not state.restart.restarts_all, "that was the attempt before"


def test_two_losses_at_one_step_that_take_the_state_end_no_run() -> None:
    """The second one while the first is replaced: whoever is there finds that nobody has it."""
    state = play([])
    for now in (1, 3):
        lose(state, now, 12)
        state.restarted(now + 1)
    lost = StateLost("the state after step 10")
    for rank in range(3):
        state.handle(stopped(rank, lost), 5)
    state.handle(Tick(), 5)
    assert state.phase is not Phase.FAILED, state.error
    assert state.restart is not None
    assert state.restart.restarts_all


def test_a_node_whose_processes_are_missed_one_by_one_ends_no_run() -> None:
    """Ray starts the new manager on the node before it knows that that is gone."""
    state = play([])
    died = "The actor died because its node has died. Node Id: 8dd1bf"
    missed = ["server-manager", "server-0", "server-1", "server-manager"]
    lose(state, 0, 12)
    for now, role in enumerate(missed):
        state.restarted(now + 0.1)
        state.handle(Failed(role, ActorLost(role, 12, died), dead=True), now + 0.2)
        for rank in range(3):
            state.handle(stopped(rank), now + 0.3)
        state.handle(Tick(), now + 0.4)
        assert state.phase is not Phase.FAILED, state.error
        assert state.restart is not None


@pytest.mark.parametrize("lost", [dead(1), MANAGER_LOST])
@pytest.mark.parametrize("resumed", [True, False])
def test_until_all_are_at_work_a_loss_has_the_checkpoint_loaded_again(
    resumed: bool, lost: Failed
) -> None:
    """Survivors may have its model, and neither its optimizer nor its tables."""
    state = JobState(3, LIMITS, 0.0, GO_ON, step=10)
    if not resumed:
        state = play([(1, dead(0)), (1, dead(1)), (1, dead(2)), (1, Tick())])
        state.restarted(2, step=10)
    again: History = [(3.0, heard(0, 10)), (3.0, lost), *((3.0, stopped(rank)) for rank in (0, 2))]
    for now, event in [*again, (3.0, stopped(1)), (3.0, Tick())]:
        state.handle(event, now)
    assert state.restart is not None
    assert (state.restart.restarts_all, state.restart.replace) == (True, (0, 1, 2))
    state.restarted(4, step=10)
    lose(state, 5, 12)
    assert state.restart is not None
    assert not state.restart.restarts_all, "all were at work"


SERVER_LOST = ActorLost("server-0", 3, "killed")


@pytest.mark.parametrize("first", [Failed("server-manager", SERVER_LOST), stopped(2, SERVER_LOST)])
@pytest.mark.parametrize("allows_restart_from_scratch", [True, False])
def test_what_a_server_kept_is_given_up_only_if_the_job_says_so(
    first: Failed, allows_restart_from_scratch: bool
) -> None:
    """Whoever notices the loss first, the manager or a worker."""
    policy = Policy(
        max_failures=3,
        survives_worker_loss=True,
        allows_restart_from_scratch=allows_restart_from_scratch,
    )
    rest: list[Event] = [*(stopped(rank, SERVER_LOST) for rank in range(3)), Tick()]
    state = play([(1, first), *((1, event) for event in rest), (1 + SETTLE_S, Tick())], policy)
    if allows_restart_from_scratch:
        assert state.restart == Restart(1, (0, 1, 2), restarts_all=True, wait_s=0.0)
    else:
        assert (state.phase, state.error) == (Phase.FAILED, SERVER_LOST)


def no_coordinator(role: str) -> Failed:
    return Failed(role, ActorLost(role, 3, "killed"), dead=True)


@pytest.mark.parametrize(
    ("history", "coordinators"),
    [
        ([(1, no_coordinator("server-manager"))], ("server-manager",)),
        # a worker notices first, the controller later
        (
            [
                (1, stopped(0, ActorLost("task-scheduler", 3, "x"))),
                (1, no_coordinator("task-scheduler")),
            ],
            ("task-scheduler",),
        ),
        # frozen, both
        (
            [(1, PollUnanswered("server-manager", 99)), (1, PollUnanswered("task-scheduler", 99))],
            ("server-manager", "task-scheduler"),
        ),
    ],
)
def test_a_lost_coordinator_takes_no_state_with_it(
    history: History, coordinators: tuple[str, ...]
) -> None:
    rest: History = [(1, stopped(rank)) for rank in range(3)]
    state = play([*history, *rest, (1, Tick())])
    assert state.restart == Restart(1, (), False, 0.0, coordinators)
    state = play([*history, (1, dead(1)), *rest, (1, Tick())])
    assert state.restart == Restart(1, (1,), False, 0.0, coordinators)
    state = play([*history, (1, stopped(2, SERVER_LOST)), *rest, (1, Tick())])
    assert state.restart == Restart(1, (0, 1, 2), restarts_all=True, wait_s=0.0)


def lose(state: JobState, now: float, step: int) -> None:
    """All ranks are at work, have made `step` steps, then rank 1 dies."""
    for rank in range(3):
        state.handle(heard(rank, step), now)
    for event in (dead(1), stopped(0), stopped(2), Tick()):
        state.handle(event, now)


def test_a_run_goes_on_and_is_watched_again() -> None:
    state = play([])
    lose(state, 1, 3)
    state.handle(Tick(), 50)
    assert state.restart is not None, "it waits until the restart was carried out"
    state.restarted(50)
    assert (state.phase.value, state.error, state.attempt) == ("starting", None, 1)
    state.handle(Tick(), 109)
    assert state.error is None
    state.handle(heard(0), 109)
    state.handle(heard(2), 109)
    state.handle(Tick(), 111)
    assert isinstance(state.error, DeadlineExceeded)
    assert state.error.missing == ("worker-1",)
    state.handle(Tick(), 111 + SETTLE_S)
    assert state.phase is Phase.FAILED, "a start that nobody comes to is not tried again"


def test_the_budget_ends_the_run_and_tells_all_failures() -> None:
    state = play([])
    for attempt, step in enumerate((3, 5, 8)):
        lose(state, attempt, step)
        state.restarted(attempt)
    lose(state, 9, 9)
    assert state.phase is Phase.FAILED
    assert isinstance(state.error, RestartsExhausted)
    assert len(state.error.failures) == 4
    assert "max_failures` is 3" in str(state.error)
    assert "after step 8: worker-1 was lost" in str(state.error)


def test_a_crash_loop_waits_then_ends() -> None:
    state = play([], Policy(max_failures=99, survives_worker_loss=True))
    waits = []
    for attempt in range(2):
        lose(state, attempt, 7)
        assert state.restart is not None
        waits.append(state.restart.wait_s)
        state.restarted(attempt)
    lose(state, 9, 7)
    assert waits == [0.0, 1.0]
    assert isinstance(state.error, RestartsExhausted)


def test_preemption_is_not_a_failure() -> None:
    policy = Policy(max_failures=0, max_preemptions=1, survives_worker_loss=True)
    news: History = [(1, dead(1, preempted=True)), (1, stopped(0)), (1, stopped(2)), (1, Tick())]
    assert play(news, policy).restart is not None
    assert play([(1, dead(1)), *news[1:]], policy).restart is None


@pytest.mark.parametrize(
    "error",
    [
        UserCodeError(1, 3, "ValueError: no", "Traceback"),
        MismatchError("g", "all_reduce", 3, (1,), "rank 1 is in broadcast"),
        DistplatError("unforeseen"),
    ],
)
def test_what_no_restart_mends(error: DistplatError) -> None:
    news: History = [(1, stopped(1, error)), (1, stopped(0, error)), (1, stopped(2, error))]
    state = play([*news, (1 + SETTLE_S, Tick())])
    assert (state.phase, state.error, state.restart) == (Phase.FAILED, error, None)


def test_a_users_error_during_repair_ends_the_run() -> None:
    user = UserCodeError(2, 3, "ValueError: no", "Traceback")
    state = play([(1, dead(1)), (1, stopped(0)), (1.5, stopped(2, user))])
    assert (state.phase, state.error) == (Phase.FAILED, user)


@pytest.mark.parametrize(
    ("lost", "holders", "everything"),
    [
        ((0,), ((0, 2), (1,)), False),  # its peer has what it had
        ((1,), ((0, 2), (1,)), True),  # nobody else has that part
        ((0, 2), ((0, 2), (1,)), True),
        ((0, 1), ((0, 1, 2),), False),
    ],
)
def test_one_holder_of_each_part_must_be_left(
    lost: tuple[int, ...], holders: tuple[tuple[int, ...], ...], everything: bool
) -> None:
    policy = Policy(max_failures=3, survives_worker_loss=True, holders=holders)
    news = [(1.0, dead(rank) if rank in lost else stopped(rank)) for rank in range(3)]
    state = play([*news, (1, Tick())], policy)
    replaced = tuple(range(3)) if everything else lost
    assert state.restart == Restart(1, replaced, everything, wait_s=0.0)
