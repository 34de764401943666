"""Ranks of a train function that diverge: a user error, without restarts."""

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
DIVERGED = MismatchError("g", "all_reduce", 3, (1,), "rank 0 in barrier")
PEER, LOADER = PeerLost("closed by peer"), InfrastructureError("a loader process was killed")
DEATH = ActorLost("worker-1", 2, "killed")


def poll_answer(rank: int, *, returned: bool = False, waits: str = "") -> Event:
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


ONE_RETURNED = [poll_answer(0), poll_answer(1, returned=True)]


@pytest.mark.parametrize(
    "events",
    [
        [*ONE_RETURNED, failed(0, DIVERGED)],
        [*ONE_RETURNED, failed(0, MISSED)],
        [*ONE_RETURNED, failed(0, PEER)],
        [
            poll_answer(0),
            failed(0, PEER),
            poll_answer(1, returned=True),
            failed(1, MISSED_AT_END, ""),
        ],
        [poll_answer(0, waits=FRAMES), poll_answer(1, returned=True), failed(1, MISSED_AT_END, "")],
    ],
)
def test_error_names_the_returned_rank_and_the_waiting_line(events: Sequence[Event]) -> None:
    state = play(events)
    assert state.phase is Phase.FAILED
    assert isinstance(state.error, UserCodeError)
    expected = (
        "rank 0, in step 3: waited for rank 1, whose function returned after step 2\n  hint: every"
    )
    assert expected in str(state.error)
    assert state.error.frames == FRAMES.rstrip()


@pytest.mark.parametrize(
    "events",
    [
        [*ONE_RETURNED, failed(0, LOADER)],
        [*ONE_RETURNED, failed(0, CollectiveError("g", "all_gather", 3, (2,), "deadline 6 s"))],
        [*ONE_RETURNED, failed(0, MISSED), failed(1, DEATH, "", dead=True)],
        [poll_answer(0), poll_answer(1), failed(0, PEER)],
        [poll_answer(0), poll_answer(1), failed(0, MISSED)],
        [poll_answer(0), poll_answer(1), failed(0, MISSED, "")],
    ],
)
def test_other_failures_restart_the_run(events: Sequence[Event]) -> None:
    state = play(events)
    assert state.restart is not None, state.error


def test_rank_missing_at_the_end_suggests_a_longer_deadline() -> None:
    state = play([*ONE_RETURNED, failed(1, MISSED_AT_END, "")])
    assert state.phase is Phase.FAILED
    assert "others did not end beside rank 1, whose function returned" in str(state.error)
    assert "raise the deadline: `strategy.timeout_s`" in str(state.error)


@pytest.mark.parametrize("returned", [True, False])
def test_wait_in_torch_distributed_fails_only_if_a_rank_returned(returned: bool) -> None:
    state = play([poll_answer(0, waits=FRAMES), poll_answer(1, returned=returned)], seconds=100)
    assert (state.phase is Phase.FAILED) is returned
    assert isinstance(state.error, UserCodeError) is returned


def test_returned_rank_is_not_stalled() -> None:
    progress = PollAnswered(0, 6, 3, finished=False)
    state = play([poll_answer(0), poll_answer(1, returned=True)], seconds=20)
    state.handle(progress, 25.0)
    state.handle(Tick(), 40.0)
    assert state.phase is Phase.RUNNING


def test_diverged_loops_show_frames_of_each_rank() -> None:
    other = "Traceback\n  train.py, line 9\n"
    state = play([poll_answer(0), poll_answer(1), failed(0, DIVERGED), failed(1, DIVERGED, other)])
    assert isinstance(state.error, UserCodeError)
    assert "ranks 0, 1, in step 3: the ranks' loops have diverged" in str(state.error)
    assert state.error.frames == f"{FRAMES}\n{other}".rstrip()


def train(config: Mapping[str, Any]) -> None:
    """A train function whose rank 1 leaves its loop after two of four steps, by an exception."""
    rank, calls = distplat.get_context().get_world_rank(), {"barrier": distplat.barrier}
    calls["gather"] = lambda: distplat.gather_for_metrics(torch.ones(3))
    layer = nn.Linear(2, 1)
    nn.init.ones_(layer.weight)
    model, optimizer = distplat.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    for step in range(4):
        try:
            if rank == 1 and step == 2:
                raise ValueError("a bad batch")
        except ValueError:
            break
        calls.get(config["call"], lambda: None)()
        backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        distplat.report({"step": step})


@pytest.fixture
def cluster() -> Iterator[InMemoryRay]:
    with InMemoryRay() as ray:
        yield ray


@pytest.mark.parametrize(
    ("strategy", "call", "line"),
    [
        ("ring", "none", "backward(model(torch.ones(1, 2)).sum())"),
        slow("ring", "barrier", "backward(model(torch.ones(1, 2)).sum())"),
        ("ps-sync", "none", "backward(model(torch.ones(1, 2)).sum())"),
        ("ps-sync", "gather", "distplat.gather_for_metrics(torch.ones(3))"),
        slow("ps-async", "gather", "distplat.gather_for_metrics(torch.ones(3))"),
    ],
)
def test_run_names_the_returned_rank_and_the_waiting_line(
    cluster: InMemoryRay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    call: str,
    line: str,
) -> None:
    limits = {"step_timeout_s": 10}
    if strategy != "ps-async":  # ps-async detects it at once
        monkeypatch.setattr(job, "SETTLE_S", 1.0)
        limits.clear()
    fields = {"name": "test", "strategy": strategy, "scaling": {"num_workers": 2}}
    extra = {"own_loop": True, "failure": limits, "storage_path": str(tmp_path)}
    trainer = Trainer(
        {**fields, **extra, "task_args": {"call": call}}, train, progress=False, log_to_driver=False
    )
    with pytest.raises(
        UserCodeError, match="rank 0, in step 3: waited for rank 1, whose"
    ) as raised:
        cluster.as_driver(trainer.fit)
    assert line in raised.value.frames
    assert raised.value.exit_code == 1


def test_frames_of_a_thread_in_torch_distributed() -> None:
    released, entered = threading.Event(), threading.Event()

    @_exception_logger
    def all_reduce() -> None:
        entered.set()
        released.wait(60)

    thread = threading.Thread(target=call_train_function, args=(lambda config: all_reduce(), {}))
    assert frames_of_wait(threading.main_thread()) == ""
    thread.start()
    try:
        assert entered.wait(60)
        assert "in <lambda>" in frames_of_wait(thread).splitlines()[1]
    finally:
        released.set()
        thread.join(60)
    assert frames_of_wait(thread) == ""


@pytest.mark.parametrize("is_enabled", [True, False])
def test_gc_is_disabled_while_frames_are_listed(
    is_enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gc enabled, a thread that starts meanwhile may deadlock the process."""
    seen: list[bool] = []

    def frames() -> dict[int, Any]:
        seen.append(gc.isenabled())
        return {}

    monkeypatch.setattr("sys._current_frames", frames)
    try:
        if not is_enabled:
            gc.disable()
        assert frame_of(threading.main_thread()) is None
        assert (seen, gc.isenabled()) == ([False], is_enabled)
    finally:
        gc.enable()
