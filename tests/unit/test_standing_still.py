"""Who stood still itself blames nobody: not the controller, who watches servers, or who waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from call_faults import Fault, drain, inject
from in_memory_processes import process_here
from jobs import fields_of, job_of
from killing_task import KillsInForward
from marks import slow
from polled_servers import servers
from ray_in_memory import InMemoryRay
from torch import Tensor

from distplat import Trainer
from distplat.actors import controller
from distplat.actors.collectives import torch_store
from distplat.actors.collectives.rendezvous import GroupSettings, wait_for
from distplat.actors.collectives.shm import liveness
from distplat.actors.collectives.torch_store import Heartbeat
from distplat.actors.servers.health_check import Heartbeats
from distplat.actors.servers.scheduler import Scheduler
from distplat.platform import awake_clock
from distplat.platform.awake_clock import MAX_GAP_S, AwakeClock, wait_awake
from distplat.platform.errors import CollectiveError, DeadlineExceeded
from distplat.platform.spec import Consistency
from distplat.platform.task_scheduler import TaskPlan
from distplat.platform.worker_stats import WorkerHeartbeat
from distplat.strategies import torch_compat

LONG_S = 3600.0


class Time:
    """Seconds as a test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    for module in (awake_clock, liveness):
        monkeypatch.setattr(module, "time", found)
    return found


def test_a_stop_counts_as_a_second(clock: Time) -> None:
    awake = AwakeClock()
    for seconds, expected in ((0.4, 0.4), (0.4, 0.8), (LONG_S, 0.8 + MAX_GAP_S), (0.2, 2.0)):
        clock.now += seconds
        assert awake.now() == pytest.approx(expected)


def test_a_wait_that_was_stopped_goes_on(clock: Time) -> None:
    changed, looks = threading.Condition(), 0

    def over() -> bool:
        nonlocal looks
        looks += 1
        clock.now += LONG_S if looks == 2 else 0.0
        return looks > 6

    with changed:
        assert wait_awake(changed, over, 60.0)


def test_a_wait_ends_at_its_deadline() -> None:
    changed = threading.Condition()
    began = time.monotonic()
    with changed:
        assert not wait_awake(changed, lambda: False, 0.2)
    assert time.monotonic() - began >= 0.2


class Halted(KillsInForward):
    """Its host stands still in the third forward of rank 0."""

    stop: ClassVar[list[Callable[[], None]]] = []

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        process = process_here()
        if process is not None and process.name == "worker-0" and self.forwards == 2:
            for stop in Halted.stop:
                time.sleep(0.5)  # who froze before its first answer may still be starting
                stop()
            Halted.stop.clear()
            process.check()
        return super().loss(outputs, targets)


@pytest.mark.parametrize("back", ["together", slow("late"), "never"])
def test_a_controller_that_stood_still_waits_for_the_answers(
    back: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host stands still for longer than the deadline; then its worker is there, later, or not."""
    monkeypatch.setattr(awake_clock, "MAX_GAP_S", 0.1)
    monkeypatch.setattr(controller, "_HOLD_S", 0.1)
    limit_s = 0.7

    def stop() -> None:
        later_s = {"together": 0.0, "late": 0.3, "never": None}[back]
        for name, seconds in (("driver", 0.0), ("controller", 0.0), ("worker-0", later_s)):
            ray.processes[name].freeze()
            if seconds is None:
                continue
            timer = threading.Timer(2 * limit_s + seconds, ray.processes[name].go_on)
            timer.daemon = True
            timer.start()

    KillsInForward.killed, Halted.stop[:] = "", [stop]
    failure = {"heartbeat_timeout_s": limit_s, "step_timeout_s": 20}
    job = fields_of("ring", 2, steps=6, storage_path=str(tmp_path), failure=failure)
    trainer = Trainer(job, Halted, progress=False, log_to_driver=False)
    with InMemoryRay() as ray:
        result = ray.as_driver(trainer.fit)
    assert not Halted.stop
    causes = [one.cause for one in result.failures]
    assert [("worker-0" in one, "frozen" in one) for one in causes] == [(True, True)] * (
        back == "never"
    )


def test_who_watches_servers_and_stood_still_waits_for_them(clock: Time) -> None:
    cluster, actors = servers(2)
    inject(cluster, "poll", Fault(delay_s=0.2), times=2)
    named = {f"server-{number}": one for number, one in enumerate(actors)}
    beats = Heartbeats(cluster.transport(), 5.0)
    assert beats.find_lost(named, ()) == {}
    clock.now += LONG_S
    assert beats.find_lost(named, ()) == {}, "their answers are on their way"
    for _ in range(5):
        clock.now += MAX_GAP_S
        assert drain(cluster, 10.0)
        assert beats.find_lost(named, ()) == {}


def test_a_collective_that_was_stopped_goes_on(clock: Time) -> None:
    segment: Any = SimpleNamespace(world=2, has_left=lambda rank: False)
    monitor = liveness.LivenessMonitor("group", segment, GroupSettings(5.0))

    def waits(*seconds: float) -> Callable[[float], bool]:
        left = list(seconds)

        def wait(slice_s: float) -> bool:
            if slice_s:
                clock.now += left.pop(0)
            return not left

        return wait

    def wait_for(*seconds: float) -> None:
        wait = waits(*seconds)
        word: Any = SimpleNamespace(wait=lambda target, slice_s: wait(slice_s))
        monitor.wait_for(word, 1, 1, liveness.RunningOp("all-reduce", 1))

    wait_for(0.1, LONG_S, 0.1, 0.1)
    with pytest.raises(CollectiveError, match="deadline 5 s"):
        wait_for(*[0.1] * 60)


def test_a_rendezvous_that_was_stopped_goes_on(clock: Time) -> None:
    settings, looks = GroupSettings(5.0, 5.0), [0.0, LONG_S, 0.1]

    def look() -> bytes | None:
        clock.now += looks.pop(0)
        return None if looks else b"there"

    assert wait_for(look, "group", lambda: (1,), settings) == b"there"
    looks = [1.0] * 7
    with pytest.raises(DeadlineExceeded, match="missing: worker-1"):
        wait_for(look, "group", lambda: (1,), settings)


def test_a_scheduler_that_stood_still_leases_nothing_again(clock: Time) -> None:
    """Workers' words wait to be heard, one after the other."""

    async def story() -> None:
        job = job_of("ps-async", 2, global_batch_size=8, failure={"heartbeat_timeout_s": 30})
        desk = Scheduler("small/task-scheduler", job, Consistency(asynchronous=True))
        for rank in range(2):
            await desk.join(rank, 0, TaskPlan(4, 2))
        held = [await desk.work(rank, 0, 0, (), ()) for rank in range(2)]
        clock.now += LONG_S
        await desk.beat(0, 0, WorkerHeartbeat(1, 1, 0.1), (0,), ())
        more = await desk.work(0, 0, 1, (), ())
        assert held[1] is not None and more is not None
        assert not {*held[1].tasks} & {*more.tasks}

    asyncio.run(story())


@pytest.mark.parametrize(
    ("stop_s", "frozen", "expected"),
    [(0.0, False, (1,)), (LONG_S, False, ()), (LONG_S, True, (1,))],
)
def test_who_was_stopped_itself_calls_no_rank_of_gloos_late(
    stop_s: float, frozen: bool, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo's deadlines run on meanwhile. A rank without heartbeats afterwards is missing."""
    here = Time()

    def rest(seconds: float) -> None:
        """Have the time go on once every rank that lives has beaten."""
        seen = [beat._beats for beat in beats]
        while any(beat._beats < was + 2 for beat, was in zip(beats, seen, strict=True)):
            time.sleep(0.001)
        here.now += seconds

    here.sleep = rest  # type: ignore[attr-defined]
    monkeypatch.setattr(torch_store, "time", here)
    monkeypatch.setattr(torch_store, "INTERVAL_S", 0.01)
    store = torch_compat.single_rank_store()
    store.set("heartbeat/1", "7 3")
    numbers = {0: 5, 2: 5} if frozen else {0: 5, 1: 3, 2: 5}
    beats = [
        Heartbeat(store, rank, 3, partial(int, number), lambda: None)
        for rank, number in numbers.items()
    ]
    rest(0.1)
    here.now += stop_s
    assert beats[0].find_missing(5, None, lambda: False) == expected
    assert (beats[0].stood_still_s() > 0) == (stop_s > 0)
    for _ in range(50):
        rest(0.1)
    assert beats[0].stood_still_s() == 0, "later operations are judged as ever"
    for beat in beats:
        beat.stop()


def test_a_reason_of_gloo_blames_nobody() -> None:
    said = (
        "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:27795. This is typically caused by a remote worker crashing. Check the logs"
    )
    assert torch_compat.error_reason(RuntimeError(said)) == (
        "Connection closed by peer [127.0.0.1]:27795."
    )
    assert torch_compat.error_reason(RuntimeError()) == "RuntimeError"
