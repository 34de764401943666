"""Decisions of the controller when the number of workers changes without a failure."""

from collections.abc import Sequence

import pytest

from distplat.platform.errors import Abandoned, ActorLost, CollectiveError, DeadlineExceeded
from distplat.platform.job import (
    SETTLE_S,
    STALL_GRACE,
    End,
    Event,
    Failed,
    JobState,
    Phase,
    PollAnswered,
    PollUnanswered,
    Resize,
    Tick,
)
from distplat.platform.recovery import Policy, Restart
from distplat.platform.spec import Failure
from distplat.platform.stop_order import StopOrder

LIMITS = Failure(start_timeout_s=60, step_timeout_s=20, heartbeat_timeout_s=10)
RECOVERABLE = Policy(max_failures=1, survives_worker_loss=True, holders=((0, 1, 2),))
NO_FAILURE = Policy(max_failures=0, survives_worker_loss=True, allows_restart_from_scratch=False)
STEP = 3
ABANDONED = Abandoned("stopped for the resize")
History = Sequence[tuple[float, Event]]


def dead(role: str | int) -> Failed:
    name = role if isinstance(role, str) else f"worker-{role}"
    return Failed(name, ActorLost(name, STEP, "killed"), dead=True)


def stopped(rank: int, error: Exception = ABANDONED) -> Failed:
    return Failed(f"worker-{rank}", error)  # type: ignore[arg-type]


def answer(rank: int, step: int = STEP, finished: bool = False) -> PollAnswered:
    return PollAnswered(rank, step + 1, step, finished)


def replay(history: History, policy: Policy = RECOVERABLE, world: int = 5) -> JobState:
    state = JobState(3, LIMITS, 0.0, policy)
    started: History = [(0, answer(rank)) for rank in range(3)]
    for now, event in [*started, (1, Resize(world)), *history]:
        state.handle(event, now)
    return state


ALL_STOPPED: History = [(1, stopped(0)), (1, stopped(1)), (1.1, stopped(2)), (1.1, Tick())]


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("policy", [RECOVERABLE, NO_FAILURE])
def test_next_attempt_has_the_new_size_once_all_stopped(world: int, policy: Policy) -> None:
    for stop in range(len(ALL_STOPPED)):
        before = replay(ALL_STOPPED[:stop], policy, world)
        assert (before.phase, before.restart, before.error) == (Phase.SETTLING, None, None)
    state = replay(ALL_STOPPED, policy, world)
    assert state.restart == Restart(1, (), restarts_all=False, wait_s=0.0, world=world)
    state.restarted(2.0)
    assert (state.phase, state.attempt, state.error) == (Phase.STARTING, 1, None)
    for rank in range(world):
        assert state.phase is Phase.STARTING
        state.handle(answer(rank, 4), 3.0)
    assert state.phase is Phase.RUNNING
    assert (state.steps_done, state.max_step) == (4, 4)


def test_resize_does_not_count_as_a_failure() -> None:
    state = replay(ALL_STOPPED, world=2)
    state.restarted(2.0)
    for number in range(5):
        for rank in range(2):
            state.handle(answer(rank), 3.0)
        state.handle(Resize(2), 3.0)
        for event in (stopped(0), stopped(1), Tick()):
            state.handle(event, 3.0)
        assert state.restart is not None
        state.restarted(3.0)
        assert state.attempt == number + 2
    state.handle(dead(1), 4.0)
    for event in (stopped(0), Tick()):
        state.handle(event, 4.0)
    assert state.restart == Restart(7, (1,), restarts_all=False, wait_s=0.0)


@pytest.mark.parametrize(
    ("world", "history", "replace"),
    [
        # before any worker has stopped, and after all others have
        (5, [(2, dead(1)), (2, stopped(0)), (2, stopped(2)), (2, Tick())], (1,)),
        (5, [(2, stopped(0)), (2, stopped(2)), (2, dead(1)), (2, Tick())], (1,)),
        # a lost worker beyond the new size is not replaced
        (2, [(2, stopped(0)), (2, stopped(1)), (2, dead(2)), (2, Tick())], ()),
        (1, [(2, dead(0)), (2, stopped(1)), (2, dead(2)), (2, Tick())], (0,)),
        # an error other than Abandoned
        (
            5,
            [
                (2, stopped(1, CollectiveError("g", "x", 3, (1,), "deadline"))),
                (2, stopped(0)),
                (2, stopped(2)),
                (2, Tick()),
            ],
            (),
        ),
        # frozen: worker-1 does not answer polls
        (
            5,
            [
                (2, stopped(0)),
                (2 + 10.1, PollUnanswered("worker-1", 10.1)),
                (2 + 10.1, stopped(2)),
                (2 + 10.1, Tick()),
            ],
            (1,),
        ),
    ],
)
def test_failure_during_resize_counts_and_the_size_changes(
    world: int, history: History, replace: tuple[int, ...]
) -> None:
    state = replay(history, world=world)
    assert state.error is not None
    assert state.restart == Restart(1, replace, restarts_all=False, wait_s=0.0, world=world)
    assert replay(history, NO_FAILURE, world).restart is None
    state.restarted(20)
    state.handle(dead(0), 20)  # the budget is one failure
    state.handle(Tick(), 20)
    for rank in range(1, world):
        state.handle(stopped(rank), 20)
    state.handle(Tick(), 20)
    assert state.phase is Phase.FAILED


def test_lost_server_during_resize_restarts_all_with_the_new_size() -> None:
    history = [(2.0, stopped(0)), (2.0, dead("server-0")), (2, stopped(1)), (2, stopped(2))]
    state = replay([*history, (2, Tick())])
    assert state.restart == Restart(1, tuple(range(5)), restarts_all=True, wait_s=0.0, world=5)
    state.restarted(3.0, step=2)
    assert (state.steps_done, state.max_step) == (2, 2)


def test_lost_coordinator_during_resize_is_replaced_and_the_size_changes() -> None:
    history: History = [(2, dead("task-scheduler")), *((2, stopped(rank)) for rank in range(3))]
    state = replay([*history, (2, Tick())])
    lost = ("task-scheduler",)
    assert state.restart == Restart(1, (), restarts_all=False, wait_s=0, coordinators=lost, world=5)


def test_restart_from_checkpoint_keeps_the_new_size() -> None:
    state = replay(ALL_STOPPED)
    state.restarted(2.0)
    for rank in range(5):
        state.handle(answer(rank), 3.0)
    state.handle(dead("server-0"), 3.0)
    for rank in range(5):
        state.handle(stopped(rank), 3.0)
    state.handle(Tick(), 3.0)
    assert state.restart == Restart(2, tuple(range(5)), restarts_all=True, wait_s=0.0)
    state.restarted(4.0, step=2)
    for rank in range(5):
        assert state.phase is Phase.STARTING
        state.handle(answer(rank, 2), 5.0)
    assert state.phase is Phase.RUNNING


def test_all_initial_workers_may_be_lost_after_others_joined() -> None:
    """Every worker has the whole model; `holders` names the initial workers only."""
    state = replay(ALL_STOPPED)
    state.restarted(2.0)
    for rank in range(5):
        state.handle(answer(rank), 3.0)
    for event in (dead(0), dead(1), dead(2), stopped(3), stopped(4), Tick()):
        state.handle(event, 3.0)
    assert state.restart == Restart(2, (0, 1, 2), restarts_all=False, wait_s=0.0)


def test_busy_worker_is_replaced_after_the_step_timeout() -> None:
    moved_at = 12
    busy: History = [(1, stopped(0)), (1, stopped(2)), (moved_at, PollAnswered(1, 9, STEP, False))]
    late = moved_at + 20 * STALL_GRACE
    state = replay([*busy, (late, PollUnanswered("worker-1", SETTLE_S + 1)), (late, Tick())])
    assert (state.restart, state.error) == (None, None)
    state = replay([*busy, (late + 0.1, Tick()), (late + 0.1, Tick())])
    assert isinstance(state.error, DeadlineExceeded)
    assert "worker-1" in str(state.error)
    assert state.restart == Restart(1, (1,), restarts_all=False, wait_s=0.0, world=5)


@pytest.mark.parametrize(
    "first",
    [
        [(0.5, answer(1, 9, finished=True))],
        [(0.5, dead(1))],
    ],
    ids=["ending", "failing"],
)
def test_resize_is_ignored_if_the_run_ends_or_fails(first: History) -> None:
    state = JobState(3, LIMITS, 0.0, RECOVERABLE)
    for now, event in [*((0.0, answer(rank)) for rank in range(3)), *first]:
        state.handle(event, now)
    phase = state.phase
    state.handle(Resize(5), 1.0)
    assert state.phase is phase
    for rank in (0, 2):
        state.handle(stopped(rank, CollectiveError("g", "x", 3, (1,), "y")), 1.0)
    state.handle(Tick(), 1.0)
    assert state.restart is not None
    assert state.restart.world is None


def test_resize_is_ignored_while_the_run_starts() -> None:
    state = JobState(3, LIMITS, 0.0, RECOVERABLE)
    state.handle(Resize(5), 1.0)
    assert state.phase is Phase.STARTING


def test_run_may_succeed_during_a_resize() -> None:
    state = replay([(1, answer(rank, 9, finished=True)) for rank in range(3)])
    assert state.phase is Phase.SUCCEEDED


def test_finished_worker_counts_as_stopped() -> None:
    state = replay(
        [(1, answer(0, 9, finished=True)), (1, stopped(1)), (1, stopped(2)), (1, Tick())]
    )
    assert state.restart == Restart(1, (), restarts_all=False, wait_s=0.0, world=5)


def test_stop_order_is_resize_until_the_next_attempt() -> None:
    state = replay([])
    assert (state.stop_order, state.resize_in_progress) == (StopOrder.RESIZE, False)
    state.handle(stopped(1), 2)
    assert (state.stop_order, state.resize_in_progress, state.restart) == (
        StopOrder.RESIZE,
        True,
        None,
    )
    state.handle(dead(0), 2)
    assert state.stop_order is StopOrder.ABANDON
    state = replay(ALL_STOPPED, world=3)
    state.restarted(2.0)
    for rank in range(3):
        assert (state.stop_order, state.resize_in_progress) == (StopOrder.NONE, False)
        state.handle(answer(rank), 2.0)
    assert (state.phase, state.stop_order) == (Phase.RUNNING, StopOrder.NONE)


def test_stop_for_a_failure_is_not_a_resize() -> None:
    state = JobState(3, LIMITS, 0.0, RECOVERABLE)
    for rank in range(3):
        state.handle(answer(rank), 1.0)
    for event in (dead(1), stopped(0)):
        state.handle(event, 1.0)
    assert not state.resize_in_progress


def test_early_end_orders_end_and_ignores_resize() -> None:
    state = JobState(3, LIMITS, 0.0, RECOVERABLE)
    for rank in range(3):
        state.handle(answer(rank), 0.0)
    state.handle(End(), 1.0)
    state.handle(Resize(5), 1.0)
    assert (state.phase, state.stop_order) == (Phase.RUNNING, StopOrder.END)
    for rank in range(3):
        state.handle(answer(rank, 5, finished=True), 1.2)
    assert state.phase is Phase.SUCCEEDED


def test_stop_with_checkpoint_overrides_an_early_end() -> None:
    state = JobState(3, LIMITS, 0.0, RECOVERABLE)
    for rank in range(3):
        state.handle(answer(rank), 0.0)
    for end, order in ((End(), StopOrder.END), (End(saves=True), StopOrder.SAVE)):
        state.handle(end, 1.0)
        assert state.stop_order is order
    state.handle(End(), 1.0)
    assert state.stop_order is StopOrder.SAVE


def test_worker_lost_during_an_early_end_is_replaced_and_the_order_repeated() -> None:
    state = JobState(3, LIMITS, 0.0, RECOVERABLE)
    for rank in range(3):
        state.handle(answer(rank), 0.0)
    state.handle(End(), 1.0)
    state.handle(dead(1), 1.2)
    assert state.stop_order is StopOrder.ABANDON
    for rank in (0, 2):
        state.handle(stopped(rank), 1.3)
    state.handle(Tick(), 1.3)
    assert state.restart is not None
    state.restarted(2.0)
    assert (state.phase, state.stop_order) == (Phase.STARTING, StopOrder.NONE)
    for rank in range(3):
        state.handle(answer(rank), 2.0)
    assert (state.phase, state.stop_order) == (Phase.RUNNING, StopOrder.END)
