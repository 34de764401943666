"""An error before the first step is told once, with the ranks and nodes that have it."""

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
    at = NODES[rank] if node is None else node
    return Failed(f"worker-{rank}", error, prepared=False, node=at)


def made(rank: int, node: str | None = None) -> PollAnswered:
    at = NODES[rank] if node is None else node
    return PollAnswered(rank, 0, 0, False, prepared=True, node=at)


def play(*news: PollAnswered | Failed | Tick, world: int = 3, now: float = 1.0) -> JobState:
    state = JobState(world, LIMITS, now=0.0)
    for event in news:
        state.handle(event, now)
    return state


def text_of(state: JobState) -> str:
    assert state.phase is Phase.FAILED
    assert isinstance(state.error, UserCodeError)
    return state.error.text


def test_a_path_that_one_node_lacks_names_node_and_path_and_who_has_it() -> None:
    state = play(failed(2, user_error(2)), made(0), failed(1, user_error(1)), Tick())
    assert text_of(state) == (
        f"your task failed on ranks 1, 2 (node gpu-2, 10.0.0.2), before the first step: {MISSING}\n"
        "  hint: rank 0 made model and data on another node: put what the task reads on gpu-2, "
        "10.0.0.2 too, under the same path, or on storage that all nodes share"
    )
    assert "Traceback of 2" in str(state.error)


def test_what_all_ranks_have_is_told_once() -> None:
    state = play(*(failed(rank, user_error(rank)) for rank in range(3)))
    assert text_of(state) == f"your task failed on every rank, before the first step: {MISSING}"


def test_one_of_several_ranks_of_one_node() -> None:
    state = play(failed(1, user_error(1), NODES[0]), made(0, NODES[0]), Tick(), world=2)
    assert text_of(state) == f"your task failed on rank 1, before the first step: {MISSING}"


def test_other_ranks_are_waited_for_no_longer_than_a_while() -> None:
    state = play(failed(1, user_error(1)), made(0), Tick())
    assert state.phase is Phase.SETTLING, "rank 2 may yet fail alike"
    state.handle(Tick(), 1.0 + SETTLE_S)
    assert "rank 1 (node gpu-2, 10.0.0.2), before" in text_of(state)


def test_a_rank_that_is_gone_is_not_waited_for() -> None:
    gone = Failed("worker-0", DistplatError("killed"), dead=True)
    state = play(failed(1, user_error(1)), gone, made(2), Tick())
    assert state.phase is Phase.FAILED


def test_a_single_worker_and_a_step_are_told_as_before() -> None:
    alone, error = user_error(0), UserCodeError(1, 3, "ValueError: no", "Traceback")
    assert play(failed(0, alone), world=1).error is alone
    state = play(made(0), made(1), made(2), Failed("worker-1", error, node=NODES[1]))
    assert state.error is error


def test_another_error_of_another_rank_is_not_counted_in() -> None:
    other = user_error(2, "KeyError: 'x'")
    state = play(made(0), failed(1, user_error(1)), failed(2, other))
    assert text_of(state).startswith("your task failed on rank 1 (node gpu-2, 10.0.0.2), before")


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_module_that_one_node_lacks(everywhere: bool) -> None:
    error = SpecError(Problem(("task",), "could not import 'lin' from /jobs", "no Python file"))
    ranks = range(3) if everywhere else range(1)
    rest = () if everywhere else (made(1), made(2))
    state = play(*rest, *(failed(rank, error) for rank in ranks), Tick())
    assert (state.phase, isinstance(state.error, SpecError)) == (Phase.FAILED, True)
    if everywhere:
        assert state.error is error
        return
    assert str(state.error) == (
        "task: could not import 'lin' from /jobs, on rank 0 (node head, 10.0.0.1)\n"
        "  hint: ranks 1, 2 made model and data on another node: put what the task reads on head, "
        "10.0.0.1 too, under the same path, or on storage that all nodes share"
    )
