"""
The port `Leases`, and the worker's heartbeat: twice a second it tells how it is doing.

    training   ─ task ─ task ─ task ─ task ─ task ─ task ─ ...
    questions        ─── ask ──▶ the next lease is here before this one is used up
    heartbeat  ──▶ made, busy ............ ──▶ made, busy
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from typing_extensions import override

from distplat.actors.messages import WorkOrder
from distplat.actors.retrying_calls import POLL_S, RETRY_PAUSE_S, ask
from distplat.actors.servers.fan_out import ANSWER_GRACE_S
from distplat.actors.servers.scheduler import HOLD_S
from distplat.actors.transport import ActorDied, Transport, Unanswered
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import Abandoned, ActorLost, DeadlineExceeded
from distplat.platform.progress import StepReport
from distplat.platform.task_scheduler import Lease, TaskPlan
from distplat.platform.worker_stats import WorkerHeartbeat
from distplat.strategies.ports import Leases

HEARTBEAT_S = 0.5
"""Between two words of a worker about itself."""
_NAME = "task-scheduler"


class RemoteLeases(Leases):
    """
    The task scheduler, seen by one worker.

    Args:
        transport: the worker's.
        order: the worker's orders, with the scheduler's handle.
        eager: whether others may wait for what this worker does: it tells of every task at once,
            and asks for more when it has none left.
        abandoned: once set, waits end.
    """

    def __init__(
        self, transport: Transport, order: WorkOrder, eager: bool, abandoned: threading.Event
    ) -> None:
        self._transport, self._scheduler, self._order = transport, order.scheduler, order
        self._rank, self._attempt = order.rank, order.attempt
        self._eager, self._abandoned = eager, abandoned
        self._lock = threading.Lock()
        self._tasks: list[int] = []  #: done, and not known to be known
        self._evaluations: list[tuple[int, int]] = []
        self._beat = WorkerHeartbeat(0, 0, 0.0)
        self._number = 0  #: of the next question
        self._question: Any = None  #: the answer to it is on its way
        self._reported = 0, 0  #: tasks and evaluations that it told of
        self._given = self._left = 0  #: tasks of the present lease, and those not done
        self._closed = threading.Event()

    @override
    def connect(self, plan: TaskPlan) -> None:
        self._beat = WorkerHeartbeat(plan.first, 0, 0.0)
        limit = self._order.job.failure.start_timeout_s

        who = self._rank, self._attempt
        join = partial(self._transport.call, self._scheduler, "join", *who, plan)
        ask(self._transport, "join", {_NAME: join}, limit, "start_timeout_s", self._check)
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        """Stop the heartbeat."""
        self._closed.set()

    def count(self, report: StepReport) -> None:
        """Take what a step, or task, of this worker took."""
        busy_s = report.seconds.get("data", 0.0) + report.seconds.get("compute", 0.0)
        before = self._beat
        step = max(before.step, report.step + 1)
        self._beat = WorkerHeartbeat(step, before.made + 1, before.busy_s + busy_s)

    @override
    def next(self, alive: Callable[[], None]) -> Lease:
        while True:
            work = self._answer(self._question or self._ask(), alive)
            self._question = None
            if work is not None:
                self._number += 1
                self._given = self._left = len(work.tasks)
                return work

    @override
    def finish(self, tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()) -> None:
        with self._lock:
            self._tasks += tasks
            self._evaluations += evaluations
        self._left -= len(tasks)
        if self._eager:
            self._send_heartbeat()
        elif self._question is None and 0 < self._left <= max(1, self._given // 4):
            self._question = self._ask()

    def _ask(self) -> Any:
        tasks, evaluations = self._done()
        self._reported = len(tasks), len(evaluations)
        where = self._rank, self._attempt, self._number
        return self._transport.call(self._scheduler, "work", *where, tasks, evaluations)

    def _answer(self, question: Any, alive: Callable[[], None]) -> Lease | None:
        """
        Wait for an answer; None: ask again.

        Raises:
            ActorLost, DeadlineExceeded: the scheduler is gone, or frozen.
        """
        limit = self._order.job.failure.heartbeat_timeout_s + HOLD_S + ANSWER_GRACE_S
        clock = AwakeClock()
        while not self._transport.wait([question], POLL_S):
            self._check()
            alive()
            if clock.now() > limit:
                setting = "failure.heartbeat_timeout_s"
                raise DeadlineExceeded("the next task", (_NAME,), limit, setting)
        alive()
        try:
            work: Lease | None = self._transport.get(question, limit)
        except Unanswered:
            time.sleep(RETRY_PAUSE_S)  # the answer got lost; asked again, it is the same
            return None
        except ActorDied as error:
            raise ActorLost(_NAME, None, str(error)) from None
        with self._lock:  # it knows of these now
            del self._tasks[: self._reported[0]], self._evaluations[: self._reported[1]]
        return work

    def _done(self) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        with self._lock:
            return tuple(self._tasks), tuple(self._evaluations)

    def _send_heartbeat(self) -> None:
        done = self._done()
        who = self._rank, self._attempt
        self._transport.call(self._scheduler, "beat", *who, self._beat, *done)

    def _check(self) -> None:
        if self._abandoned.is_set():
            raise Abandoned(f"rank {self._rank} was told to wait no longer")

    def _send_heartbeats(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            self._send_heartbeat()
