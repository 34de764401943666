"""A rank of a train function that has left the others: the user's error, without restarts."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from ray_in_memory import InMemoryRay
from torch import nn
from torch.autograd import backward
from torch.distributed.c10d_logger import _exception_logger

import distplat
from distplat import Trainer
from distplat.actors.task_loading import call_train_function
from distplat.actors.user_errors import frame_of, frames_of_wait
from distplat.platform import job
from distplat.platform.diverged_loops import LoopState
from distplat.platform.errors import (
    ActorLost,
    CollectiveError,
    DistplatError,
    InfrastructureError,
    MismatchError,
    PeerLost,
    UserCodeError,
)
from distplat.platform.job import SETTLE_S, Event, Failed, JobState, Phase, PollAnswered, Tick
from distplat.platform.recovery import Policy
from distplat.platform.spec import Failure

FRAMES = "Traceback\n  train.py, line 7\n"
MISSED = CollectiveError("g", "all_gather", 3, (1,), "deadline 6 s")
MISSED_AT_END = CollectiveError("g", "all_reduce", 3, (0,), "deadline 6 s")
APART = MismatchError("g", "all_reduce", 3, (1,), "rank 0 in barrier")
PEER, LOADER = PeerLost("closed by peer"), InfrastructureError("a loader process was killed")
DEATH = ActorLost("worker-1", 2, "killed")


def heard(rank: int, *, returned: bool = False, waits: str = "") -> Event:
    state = LoopState("after step 2" if returned else "", waits)
    return PollAnswered(rank, 5, 2, finished=False, loop=state)


def failed(rank: int, error: DistplatError, frames: str = FRAMES, *, dead: bool = False) -> Event:
    return Failed(f"worker-{rank}", error, dead, traceback=frames)


def play(events: Sequence[Event], *, seconds: float = SETTLE_S) -> JobState:
    limits = Failure(start_timeout_s=60, step_timeout_s=20, heartbeat_timeout_s=10)
    state = JobState(2, limits, 0.0, Policy(max_failures=3, max_preemptions=3))
    for event in events:
        state.handle(event, 1.0)
    state.handle(Tick(), 1.0 + seconds)
    return state


LEFT = [heard(0), heard(1, returned=True)]


@pytest.mark.parametrize(
    "events",
    [
        [*LEFT, failed(0, APART)],
        [*LEFT, failed(0, MISSED)],
        [*LEFT, failed(0, PEER)],
        [heard(0), failed(0, PEER), heard(1, returned=True), failed(1, MISSED_AT_END, "")],
        [heard(0, waits=FRAMES), heard(1, returned=True), failed(1, MISSED_AT_END, "")],
    ],
)
def test_who_waits_for_a_rank_that_has_left_is_told_where(events: Sequence[Event]) -> None:
    state = play(events)
    assert state.phase is Phase.FAILED
    assert isinstance(state.error, UserCodeError)
    left = (
        "rank 0, in step 3: waited for rank 1, whose function returned after step 2\n  hint: every"
    )
    assert left in str(state.error)
    assert state.error.frames == FRAMES.rstrip()


@pytest.mark.parametrize(
    "events",
    [
        [*LEFT, failed(0, LOADER)],
        [*LEFT, failed(0, CollectiveError("g", "all_gather", 3, (2,), "deadline 6 s"))],
        [*LEFT, failed(0, MISSED), failed(1, DEATH, "", dead=True)],
        [heard(0), heard(1), failed(0, PEER)],
        [heard(0), heard(1), failed(0, MISSED)],
        [heard(0), heard(1), failed(0, MISSED, "")],
    ],
)
def test_what_no_loop_is_to_blame_for_is_tried_again(events: Sequence[Event]) -> None:
    state = play(events)
    assert state.restart is not None, state.error


def test_who_has_not_come_to_the_end_may_be_given_longer() -> None:
    state = play([*LEFT, failed(1, MISSED_AT_END, "")])
    assert state.phase is Phase.FAILED
    assert "others did not end beside rank 1, whose function returned" in str(state.error)
    assert "raise the deadline: `strategy.timeout_s`" in str(state.error)


@pytest.mark.parametrize("left", [True, False])
def test_who_stands_still_in_torch_distributed_waits_for_who_has_left(left: bool) -> None:
    state = play([heard(0, waits=FRAMES), heard(1, returned=left)], seconds=100)
    assert (state.phase is Phase.FAILED) is left
    assert isinstance(state.error, UserCodeError) is left


def test_who_has_returned_does_not_stand_still() -> None:
    at_work = PollAnswered(0, 6, 3, finished=False)
    state = play([heard(0), heard(1, returned=True)], seconds=20)
    state.handle(at_work, 25.0)
    state.handle(Tick(), 40.0)
    assert state.phase is Phase.RUNNING


def test_loops_that_part_show_where_each_rank_is() -> None:
    other = "Traceback\n  train.py, line 9\n"
    state = play([heard(0), heard(1), failed(0, APART), failed(1, APART, other)])
    assert isinstance(state.error, UserCodeError)
    assert "ranks 0, 1, in step 3: the ranks' loops have diverged" in str(state.error)
    assert state.error.frames == f"{FRAMES}\n{other}".rstrip()


def leaves(config: Mapping[str, Any]) -> None:
    """Have rank 1 leave after two of four steps, though its own exception is nothing to others."""
    rank, words = distplat.get_context().get_world_rank(), {"barrier": distplat.barrier}
    words["gather"] = lambda: distplat.gather_for_metrics(torch.ones(3))
    layer = nn.Linear(2, 1)
    nn.init.ones_(layer.weight)
    model, optimizer = distplat.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    for step in range(4):
        try:
            if rank == 1 and step == 2:
                raise ValueError("a bad batch")
        except ValueError:
            break
        words.get(config["word"], lambda: None)()
        backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        distplat.report({"step": step})


@pytest.fixture
def cluster() -> Iterator[InMemoryRay]:
    with InMemoryRay() as ray:
        yield ray


@pytest.mark.parametrize(
    ("strategy", "word", "line"),
    [
        ("ring", "none", "backward(model(torch.ones(1, 2)).sum())"),
        slow("ring", "barrier", "backward(model(torch.ones(1, 2)).sum())"),
        ("ps-sync", "none", "backward(model(torch.ones(1, 2)).sum())"),
        ("ps-sync", "gather", "distplat.gather_for_metrics(torch.ones(3))"),
        slow("ps-async", "gather", "distplat.gather_for_metrics(torch.ones(3))"),
    ],
)
def test_a_run_names_who_has_left_and_the_line_of_who_waits(
    cluster: InMemoryRay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    word: str,
    line: str,
) -> None:
    limits = {"step_timeout_s": 10}
    if strategy != "ps-async":  # it is told at once
        monkeypatch.setattr(job, "SETTLE_S", 1.0)
        limits.clear()
    fields = {"name": "test", "strategy": strategy, "scaling": {"num_workers": 2}}
    more = {"own_loop": True, "failure": limits, "storage_path": str(tmp_path)}
    trainer = Trainer(
        {**fields, **more, "task_args": {"word": word}}, leaves, progress=False, log_to_driver=False
    )
    with pytest.raises(
        UserCodeError, match="rank 0, in step 3: waited for rank 1, whose"
    ) as raised:
        cluster.as_driver(trainer.fit)
    assert line in raised.value.frames
    assert raised.value.exit_code == 1


def test_a_thread_in_torch_distributed_shows_its_frames() -> None:
    over, inside = threading.Event(), threading.Event()

    @_exception_logger
    def all_reduce() -> None:
        inside.set()
        over.wait(60)

    thread = threading.Thread(target=call_train_function, args=(lambda config: all_reduce(), {}))
    assert frames_of_wait(threading.main_thread()) == ""
    thread.start()
    try:
        assert inside.wait(60)
        assert "in <lambda>" in frames_of_wait(thread).splitlines()[1]
    finally:
        over.set()
        thread.join(60)
    assert frames_of_wait(thread) == ""


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_while_the_interpreter_lists_frames(
    collects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a thread that starts meanwhile may keep the whole process for ever."""
    seen: list[bool] = []

    def frames() -> dict[int, Any]:
        seen.append(gc.isenabled())
        return {}

    monkeypatch.setattr("sys._current_frames", frames)
    try:
        if not collects:
            gc.disable()
        assert frame_of(threading.main_thread()) is None
        assert (seen, gc.isenabled()) == ([False], collects)
    finally:
        gc.enable()
