"""An error before the first step is reported once, with its ranks and nodes."""

import pytest

from distplat.platform.errors import DistplatError, Problem, SpecError, UserCodeError
from distplat.platform.job import SETTLE_S, Failed, JobState, Phase, PollAnswered, Tick
from distplat.platform.spec import Failure

LIMITS = Failure(start_timeout_s=60, step_timeout_s=20, heartbeat_timeout_s=10)
NODES = ("head, 10.0.0.1", "gpu-2, 10.0.0.2", "gpu-2, 10.0.0.2")
MISSING = "FileNotFoundError: [Errno 2] No such file or directory: '/data/train.bin'"


def user_error(rank: int, summary: str = MISSING) -> UserCodeError:
    return UserCodeError(rank, None, summary, f"Traceback of {rank}\n{summary}")


def failed(rank: int, error: DistplatError, node: str | None = None) -> Failed:
    node_name = NODES[rank] if node is None else node
    return Failed(f"worker-{rank}", error, prepared=False, node=node_name)


def prepared(rank: int, node: str | None = None) -> PollAnswered:
    node_name = NODES[rank] if node is None else node
    return PollAnswered(rank, 0, 0, False, prepared=True, node=node_name)


def handle_events(
    *events: PollAnswered | Failed | Tick, world: int = 3, now: float = 1.0
) -> JobState:
    state = JobState(world, LIMITS, now=0.0)
    for event in events:
        state.handle(event, now)
    return state


def text_of(state: JobState) -> str:
    assert state.phase is Phase.FAILED
    assert isinstance(state.error, UserCodeError)
    return state.error.text


def test_path_missing_on_one_node_names_node_and_other_ranks() -> None:
    state = handle_events(failed(2, user_error(2)), prepared(0), failed(1, user_error(1)), Tick())
    assert text_of(state) == (
        f"your task failed on ranks 1, 2 (node gpu-2, 10.0.0.2), before the first step: {MISSING}\n"
        "  hint: rank 0 made model and data on another node: put what the task reads on gpu-2, "
        "10.0.0.2 too, under the same path, or on storage that all nodes share"
    )
    assert "Traceback of 2" in str(state.error)


def test_error_of_all_ranks_is_reported_once() -> None:
    state = handle_events(*(failed(rank, user_error(rank)) for rank in range(3)))
    assert text_of(state) == f"your task failed on every rank, before the first step: {MISSING}"


def test_error_of_one_rank_among_several_on_a_node() -> None:
    state = handle_events(
        failed(1, user_error(1), NODES[0]), prepared(0, NODES[0]), Tick(), world=2
    )
    assert text_of(state) == f"your task failed on rank 1, before the first step: {MISSING}"


def test_waits_a_limited_time_for_errors_of_other_ranks() -> None:
    state = handle_events(failed(1, user_error(1)), prepared(0), Tick())
    assert state.phase is Phase.SETTLING, "rank 2 may still fail with the same error"
    state.handle(Tick(), 1.0 + SETTLE_S)
    assert "rank 1 (node gpu-2, 10.0.0.2), before" in text_of(state)


def test_does_not_wait_for_lost_rank() -> None:
    lost = Failed("worker-0", DistplatError("killed"), dead=True)
    state = handle_events(failed(1, user_error(1)), lost, prepared(2), Tick())
    assert state.phase is Phase.FAILED


def test_error_of_single_worker_or_during_step_is_unchanged() -> None:
    single_error, error = user_error(0), UserCodeError(1, 3, "ValueError: no", "Traceback")
    assert handle_events(failed(0, single_error), world=1).error is single_error
    state = handle_events(
        prepared(0), prepared(1), prepared(2), Failed("worker-1", error, node=NODES[1])
    )
    assert state.error is error


def test_different_error_of_other_rank_is_not_merged() -> None:
    other_error = user_error(2, "KeyError: 'x'")
    state = handle_events(prepared(0), failed(1, user_error(1)), failed(2, other_error))
    assert text_of(state).startswith("your task failed on rank 1 (node gpu-2, 10.0.0.2), before")


@pytest.mark.parametrize("everywhere", [True, False])
def test_module_missing_on_one_node(everywhere: bool) -> None:
    error = SpecError(Problem(("task",), "could not import 'lin' from /jobs", "no Python file"))
    ranks = range(3) if everywhere else range(1)
    prepared_ranks = () if everywhere else (prepared(1), prepared(2))
    state = handle_events(*prepared_ranks, *(failed(rank, error) for rank in ranks), Tick())
    assert (state.phase, isinstance(state.error, SpecError)) == (Phase.FAILED, True)
    if everywhere:
        assert state.error is error
        return
    assert str(state.error) == (
        "task: could not import 'lin' from /jobs, on rank 0 (node head, 10.0.0.1)\n"
        "  hint: ranks 1, 2 made model and data on another node: put what the task reads on head, "
        "10.0.0.1 too, under the same path, or on storage that all nodes share"
    )
