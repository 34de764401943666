"""The task scheduler's actor without Ray: what it keeps open, refuses, and hands on."""

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

COURSE = TaskPlan(steps=4, parts=2)
DEALT = Consistency(asynchronous=True)


def scheduler(how: Consistency = DEALT, silent_s: float = 60.0) -> Scheduler:
    strategy = "ps-async" if how.asynchronous else "ps-sync"
    job = job_of(strategy, 2, global_batch_size=8, failure={"heartbeat_timeout_s": silent_s})
    return Scheduler("small/task-scheduler", job, how)


def play(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 10))


def test_a_question_is_kept_until_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplat.actors.servers.scheduler.HOLD_S", 60.0)

    async def story() -> None:
        desk = scheduler(Consistency(asynchronous=True, bound=0))
        for rank in range(2):
            await desk.join(rank, 0, COURSE)
        first = [await desk.work(rank, 0, 0, (), ()) for rank in range(2)]
        assert [list(work.tasks) for work in first if work] == [[0], [1]]
        kept = asyncio.create_task(desk.work(0, 0, 1, (0,), ()))
        await asyncio.sleep(0.05)
        assert not kept.done()
        await desk.beat(1, 0, WorkerHeartbeat(1, 1, 0.1), (1,), ())
        work = await kept
        assert work is not None and list(work.tasks) == [2]

    play(story())


def test_what_a_silent_worker_holds_is_leased_again() -> None:
    async def story() -> None:
        desk = scheduler(silent_s=0.3)
        for rank in range(2):
            await desk.join(rank, 0, TaskPlan(1, 2))
        await desk.work(1, 0, 0, (), ())  # it is frozen from here on
        await desk.work(0, 0, 0, (), ())
        work, asked = None, 0.0
        while work is None:
            await desk.beat(0, 0, WorkerHeartbeat(1, 1, 0.1), (1,), ())
            work = await desk.work(0, 0, 1, (), ())
            asked += HOLD_S
            assert asked < 5
        assert list(work.tasks) == [0]

    play(story())


def test_earlier_attempts_are_refused_and_their_leases_given_out_again() -> None:
    async def story() -> None:
        desk = scheduler()
        for rank in range(2):
            await desk.join(rank, 0, TaskPlan(1, 1))
        await desk.work(0, 0, 0, (), ())
        kept = asyncio.create_task(desk.work(1, 0, 0, (), ()))
        await asyncio.sleep(0.05)
        await desk.join(0, 1, TaskPlan(1, 1))
        with pytest.raises(FencedError, match="attempt 0 refused"):
            await kept
        with pytest.raises(FencedError, match="attempt 0 refused"):
            await desk.work(0, 0, 1, (0,), ())
        await desk.beat(0, 0, WorkerHeartbeat(3, 3, 1.0), (0,), ())  # late, and passed over
        work = await desk.work(0, 1, 0, (), ())
        assert work is not None and list(work.tasks) == [0]

    play(story())


def test_a_worker_with_other_data_is_refused() -> None:
    async def story() -> None:
        desk = scheduler()
        await desk.join(0, 0, COURSE)
        await desk.join(1, 0, TaskPlan(4, 2, first=2))  # it joined later
        with pytest.raises(ProtocolError, match="rank 2 built another data set"):
            await desk.join(2, 0, TaskPlan(5, 2))

    play(story())


def test_a_worker_that_is_dismissed_is_shown_until_it_is_gone() -> None:
    async def story() -> None:
        desk = scheduler()
        for rank in range(2):
            await desk.join(rank, 0, COURSE)
            await desk.work(rank, 0, 0, (), ())
        await desk.dismiss((1,))
        assert [entry.leaving for entry in (await desk.status()).workers] == [False, True]
        last = await desk.work(1, 0, 1, (1,), ())
        assert last is not None and (last.over, last.trained) == (True, False)
        await desk.forget(1)
        status = await desk.status()
        assert [entry.stats.rank for entry in status.workers] == [0]
        assert (status.workers[0].lease, status.done) == ((0, 0, 1), 0)

    play(story())


def test_a_synchronous_run_is_told_of_by_its_workers() -> None:
    async def story() -> None:
        desk = scheduler(SYNCHRONOUS)
        for rank in range(2):
            await desk.join(rank, 0, COURSE)
            await desk.beat(rank, 0, WorkerHeartbeat(3, 3, 0.3 + rank), (), ())
        status = await desk.status()
        assert (status.dynamic_tasks, status.done, status.steps) == (False, 3, 4)
        assert [entry.stats.straggler for entry in status.workers] == [False, True]

    play(story())


def test_an_attempt_of_another_number_of_workers_has_another_roster() -> None:
    async def story() -> None:
        desk = scheduler(SYNCHRONOUS)
        for rank in range(2):
            await desk.join(rank, 0, COURSE)
        for rank in (2, 0, 1):
            await desk.join(rank, 1, TaskPlan(4, 3, first=2))
        status = await desk.status()
        assert (status.attempt, status.parts) == (1, 3)
        assert [entry.stats.rank for entry in status.workers] == [0, 1, 2]
        await desk.join(0, 2, TaskPlan(4, 1, first=3))
        await desk.beat(2, 1, WorkerHeartbeat(3, 3, 1.0), (), ())  # late, of one who has left
        assert [entry.stats.rank for entry in (await desk.status()).workers] == [0]
        with pytest.raises(ProtocolError, match="rank 1 built another data set"):
            await desk.join(1, 2, TaskPlan(4, 2))

    play(story())
