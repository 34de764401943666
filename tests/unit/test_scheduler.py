"""The task scheduler's actor without Ray: pending requests, fencing, leases, status."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from jobs import job_of

from distplat.actors.servers.scheduler import HOLD_S, Scheduler
from distplat.platform.errors import FencedError, ProtocolError
from distplat.platform.spec import SYNCHRONOUS, Consistency
from distplat.platform.task_scheduler import TaskPlan
from distplat.platform.worker_stats import WorkerHeartbeat

PLAN = TaskPlan(steps=4, parts=2)
ASYNCHRONOUS = Consistency(asynchronous=True)


def make_scheduler(
    consistency: Consistency = ASYNCHRONOUS, heartbeat_timeout_s: float = 60.0
) -> Scheduler:
    strategy = "ps-async" if consistency.asynchronous else "ps-sync"
    job = job_of(
        strategy, 2, global_batch_size=8, failure={"heartbeat_timeout_s": heartbeat_timeout_s}
    )
    return Scheduler("small/task-scheduler", job, consistency)


def run_async(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10))


def test_work_request_waits_until_work_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplat.actors.servers.scheduler.HOLD_S", 60.0)

    async def scenario() -> None:
        scheduler = make_scheduler(Consistency(asynchronous=True, bound=0))
        for rank in range(2):
            await scheduler.join(rank, 0, PLAN)
        leases = [await scheduler.work(rank, 0, 0, (), ()) for rank in range(2)]
        assert [list(lease.tasks) for lease in leases if lease] == [[0], [1]]
        pending = asyncio.create_task(scheduler.work(0, 0, 1, (0,), ()))
        await asyncio.sleep(0.05)
        assert not pending.done()
        await scheduler.beat(1, 0, WorkerHeartbeat(1, 1, 0.1), (1,), ())
        work = await pending
        assert work is not None and list(work.tasks) == [2]

    run_async(scenario())


def test_lease_of_silent_worker_is_reassigned() -> None:
    async def scenario() -> None:
        scheduler = make_scheduler(heartbeat_timeout_s=0.3)
        for rank in range(2):
            await scheduler.join(rank, 0, TaskPlan(1, 2))
        await scheduler.work(1, 0, 0, (), ())  # no heartbeat from here on
        await scheduler.work(0, 0, 0, (), ())
        work, waited_s = None, 0.0
        while work is None:
            await scheduler.beat(0, 0, WorkerHeartbeat(1, 1, 0.1), (1,), ())
            work = await scheduler.work(0, 0, 1, (), ())
            waited_s += HOLD_S
            assert waited_s < 5
        assert list(work.tasks) == [0]

    run_async(scenario())


def test_rejects_earlier_attempts_and_reassigns_their_leases() -> None:
    async def scenario() -> None:
        scheduler = make_scheduler()
        for rank in range(2):
            await scheduler.join(rank, 0, TaskPlan(1, 1))
        await scheduler.work(0, 0, 0, (), ())
        pending = asyncio.create_task(scheduler.work(1, 0, 0, (), ()))
        await asyncio.sleep(0)  # it waits
        await scheduler.join(0, 1, TaskPlan(1, 1))
        with pytest.raises(FencedError, match="attempt 0 refused"):
            await pending
        with pytest.raises(FencedError, match="attempt 0 refused"):
            await scheduler.work(0, 0, 1, (0,), ())
        await scheduler.beat(0, 0, WorkerHeartbeat(3, 3, 1.0), (0,), ())  # late: ignored
        work = await scheduler.work(0, 1, 0, (), ())
        assert work is not None and list(work.tasks) == [0]

    run_async(scenario())


def test_rejects_worker_with_different_data_set() -> None:
    async def scenario() -> None:
        scheduler = make_scheduler()
        await scheduler.join(0, 0, PLAN)
        await scheduler.join(1, 0, TaskPlan(4, 2, first=2))  # a worker that joined later
        with pytest.raises(ProtocolError, match="rank 2 built another data set"):
            await scheduler.join(2, 0, TaskPlan(5, 2))

    run_async(scenario())


def test_dismissed_worker_is_in_status_until_forgotten() -> None:
    async def scenario() -> None:
        scheduler = make_scheduler()
        for rank in range(2):
            await scheduler.join(rank, 0, PLAN)
            await scheduler.work(rank, 0, 0, (), ())
        await scheduler.dismiss((1,))
        assert [entry.leaving for entry in (await scheduler.status()).workers] == [False, True]
        last = await scheduler.work(1, 0, 1, (1,), ())
        assert last is not None and (last.over, last.trained) == (True, False)
        await scheduler.forget(1)
        status = await scheduler.status()
        assert [entry.stats.rank for entry in status.workers] == [0]
        assert (status.workers[0].lease, status.done) == ((0, 0, 1), 0)

    run_async(scenario())


def test_status_of_synchronous_run_comes_from_heartbeats() -> None:
    async def scenario() -> None:
        scheduler = make_scheduler(SYNCHRONOUS)
        for rank in range(2):
            await scheduler.join(rank, 0, PLAN)
            await scheduler.beat(rank, 0, WorkerHeartbeat(3, 3, 0.3 + rank), (), ())
        status = await scheduler.status()
        assert (status.dynamic_tasks, status.done, status.steps) == (False, 3, 4)
        assert [entry.stats.straggler for entry in status.workers] == [False, True]

    run_async(scenario())


def test_new_attempt_replaces_the_list_of_workers() -> None:
    async def scenario() -> None:
        scheduler = make_scheduler(SYNCHRONOUS)
        for rank in range(2):
            await scheduler.join(rank, 0, PLAN)
        for rank in (2, 0, 1):
            await scheduler.join(rank, 1, TaskPlan(4, 3, first=2))
        status = await scheduler.status()
        assert (status.attempt, status.parts) == (1, 3)
        assert [entry.stats.rank for entry in status.workers] == [0, 1, 2]
        await scheduler.join(0, 2, TaskPlan(4, 1, first=3))
        await scheduler.beat(
            2, 1, WorkerHeartbeat(3, 3, 1.0), (), ()
        )  # late, from a removed worker
        assert [entry.stats.rank for entry in (await scheduler.status()).workers] == [0]
        with pytest.raises(ProtocolError, match="rank 1 built another data set"):
            await scheduler.join(1, 2, TaskPlan(4, 2))

    run_async(scenario())
