"""A process that was paused itself does not report other processes as lost."""

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
from polled_servers import spawn_servers
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


class FakeTime:
    """Module `time` with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake_time = FakeTime()
    for module in (awake_clock, liveness):
        monkeypatch.setattr(module, "time", fake_time)
    return fake_time


def test_pause_counts_as_one_second(clock: FakeTime) -> None:
    awake = AwakeClock()
    for seconds, expected in ((0.4, 0.4), (0.4, 0.8), (LONG_S, 0.8 + MAX_GAP_S), (0.2, 2.0)):
        clock.now += seconds
        assert awake.now() == pytest.approx(expected)


def test_wait_continues_after_pause(clock: FakeTime) -> None:
    changed, calls = threading.Condition(), 0

    def condition() -> bool:
        nonlocal calls
        calls += 1
        clock.now += LONG_S if calls == 2 else 0.0
        return calls > 6

    with changed:
        assert wait_awake(changed, condition, 60.0)


def test_wait_ends_at_its_deadline() -> None:
    changed = threading.Condition()
    began = time.monotonic()
    with changed:
        assert not wait_awake(changed, lambda: False, 0.2)
    assert time.monotonic() - began >= 0.2


class FreezesHost(KillsInForward):
    """Task that freezes its host in the third forward of rank 0."""

    freeze_calls: ClassVar[list[Callable[[], None]]] = []

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        process = process_here()
        if process is not None and process.name == "worker-0" and self.forwards == 2:
            for freeze_calls in FreezesHost.freeze_calls:
                time.sleep(0.5)  # before its first reply a worker counts as starting
                freeze_calls()
            FreezesHost.freeze_calls.clear()
            process.check()
        return super().loss(outputs, targets)


@pytest.mark.parametrize("recovery", ["together", slow("late"), "never"])
def test_controller_waits_for_workers_after_pause_of_host(
    recovery: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host freezes beyond the deadline; its worker resumes at once, later, or never."""
    monkeypatch.setattr(awake_clock, "MAX_GAP_S", 0.1)
    monkeypatch.setattr(controller, "_HOLD_S", 0.1)
    limit_s = 0.7

    def freeze_host() -> None:
        delay_s = {"together": 0.0, "late": 0.3, "never": None}[recovery]
        for name, seconds in (("driver", 0.0), ("controller", 0.0), ("worker-0", delay_s)):
            ray.processes[name].freeze()
            if seconds is None:
                continue
            timer = threading.Timer(2 * limit_s + seconds, ray.processes[name].resume)
            timer.daemon = True
            timer.start()

    KillsInForward.killed, FreezesHost.freeze_calls[:] = "", [freeze_host]
    failure = {"heartbeat_timeout_s": limit_s, "step_timeout_s": 20}
    job = fields_of("ring", 2, steps=6, storage_path=str(tmp_path), failure=failure)
    trainer = Trainer(job, FreezesHost, progress=False, log_to_driver=False)
    with InMemoryRay() as ray:
        result = ray.as_driver(trainer.fit)
    assert not FreezesHost.freeze_calls
    causes = [cause.cause for cause in result.failures]
    assert [("worker-0" in cause, "frozen" in cause) for cause in causes] == [(True, True)] * (
        recovery == "never"
    )


def test_manager_waits_for_servers_after_its_own_pause(clock: FakeTime) -> None:
    cluster, actors = spawn_servers(2)
    inject(cluster, "poll", Fault(delay_s=0.2), times=2)
    actors_by_name = {f"server-{index}": actor for index, actor in enumerate(actors)}
    heartbeats = Heartbeats(cluster.transport(), 5.0)
    assert heartbeats.find_lost(actors_by_name, ()) == {}
    clock.now += LONG_S
    assert heartbeats.find_lost(actors_by_name, ()) == {}, "replies are pending"
    for _ in range(5):
        clock.now += MAX_GAP_S
        assert drain(cluster, 10.0)
        assert heartbeats.find_lost(actors_by_name, ()) == {}


def test_collective_continues_after_pause(clock: FakeTime) -> None:
    segment: Any = SimpleNamespace(world=2, has_left=lambda rank: False)
    monitor = liveness.LivenessMonitor("group", segment, GroupSettings(5.0))

    def wait_slices(*seconds: float) -> Callable[[float], bool]:
        remaining = list(seconds)

        def wait(slice_s: float) -> bool:
            if slice_s:
                clock.now += remaining.pop(0)
            return not remaining

        return wait

    def wait_for(*seconds: float) -> None:
        wait = wait_slices(*seconds)
        word: Any = SimpleNamespace(wait=lambda target, slice_s: wait(slice_s))
        monitor.wait_for(word, 1, 1, liveness.RunningOp("all-reduce", 1))

    wait_for(0.1, LONG_S, 0.1, 0.1)
    with pytest.raises(CollectiveError, match="deadline 5 s"):
        wait_for(*[0.1] * 60)


def test_rendezvous_continues_after_pause(clock: FakeTime) -> None:
    settings, delays = GroupSettings(5.0, 5.0), [0.0, LONG_S, 0.1]

    def poll() -> bytes | None:
        clock.now += delays.pop(0)
        return None if delays else b"there"

    assert wait_for(poll, "group", lambda: (1,), settings) == b"there"
    delays = [1.0] * 7
    with pytest.raises(DeadlineExceeded, match="missing: worker-1"):
        wait_for(poll, "group", lambda: (1,), settings)


def test_scheduler_keeps_leases_after_its_own_pause(clock: FakeTime) -> None:
    """The workers' heartbeats were queued during the pause."""

    async def scenario() -> None:
        job = job_of("ps-async", 2, global_batch_size=8, failure={"heartbeat_timeout_s": 30})
        scheduler = Scheduler("small/task-scheduler", job, Consistency(asynchronous=True))
        for rank in range(2):
            await scheduler.join(rank, 0, TaskPlan(4, 2))
        leases = [await scheduler.work(rank, 0, 0, (), ()) for rank in range(2)]
        clock.now += LONG_S
        await scheduler.beat(0, 0, WorkerHeartbeat(1, 1, 0.1), (0,), ())
        lease = await scheduler.work(0, 0, 1, (), ())
        assert leases[1] is not None and lease is not None
        assert not {*leases[1].tasks} & {*lease.tasks}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("stop_s", "frozen", "expected"),
    [(0.0, False, (1,)), (LONG_S, False, ()), (LONG_S, True, (1,))],
)
def test_rank_reports_no_missing_ranks_after_its_own_pause(
    stop_s: float, frozen: bool, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo's deadlines expire during the pause. A rank without later heartbeats is missing."""
    fake_time = FakeTime()

    def sleep(seconds: float) -> None:
        """Advance the clock once each live rank has sent heartbeats."""
        counts = [beat._beats for beat in beats]
        while any(beat._beats < count + 2 for beat, count in zip(beats, counts, strict=True)):
            time.sleep(0.001)
        fake_time.now += seconds

    fake_time.sleep = sleep  # type: ignore[attr-defined]
    monkeypatch.setattr(torch_store, "time", fake_time)
    monkeypatch.setattr(torch_store, "INTERVAL_S", 0.002)
    store = torch_compat.single_rank_store()
    store.set("heartbeat/1", "7 3")
    numbers = {0: 5, 2: 5} if frozen else {0: 5, 1: 3, 2: 5}
    beats = [
        Heartbeat(store, rank, 3, partial(int, number), lambda: None)
        for rank, number in numbers.items()
    ]
    sleep(0.1)
    fake_time.now += stop_s
    assert beats[0].find_missing(5, None, lambda: False) == expected
    assert (beats[0].stood_still_s() > 0) == (stop_s > 0)
    for _ in range(50):
        sleep(0.1)
    assert beats[0].stood_still_s() == 0, "later operations are not affected"
    for beat in beats:
        beat.stop()


def test_gloo_error_is_shortened() -> None:
    message = (
        "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:27795. This is typically caused by a remote worker crashing. Check the logs"
    )
    assert torch_compat.error_reason(RuntimeError(message)) == (
        "Connection closed by peer [127.0.0.1]:27795."
    )
    assert torch_compat.error_reason(RuntimeError()) == "RuntimeError"
