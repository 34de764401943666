"""
Implementation of the port `Leases`, and the worker's heartbeat, sent twice a second.

    training   ─ task ─ task ─ task ─ task ─ task ─ task ─ ...
    requests         ── work ──▶ the next lease arrives before the current one is used up
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
"""Period of a worker's heartbeats."""
_NAME = "task-scheduler"


class RemoteLeases(Leases):
    """
    A worker's client of the task scheduler.

    Args:
        transport: the worker's.
        order: the worker's orders, with the scheduler's handle.
        eager: whether other workers may wait for this worker's tasks. If so, each finished task is
            reported at once, and the next lease is requested only when no task is left.
        abandoned: once set, waits end.
    """

    def __init__(
        self, transport: Transport, order: WorkOrder, eager: bool, abandoned: threading.Event
    ) -> None:
        self._transport, self._scheduler, self._order = transport, order.scheduler, order
        self._rank, self._attempt = order.rank, order.attempt
        self._eager, self._abandoned = eager, abandoned
        self._lock = threading.Lock()
        self._tasks: list[int] = []  #: finished, not yet acknowledged by the scheduler
        self._evaluations: list[tuple[int, int]] = []  #: finished, not yet acknowledged
        self._beat = WorkerHeartbeat(0, 0, 0.0)
        self._number = 0  #: of the next request
        self._request: Any = None  #: reply of the open request for work
        self._reported = 0, 0  #: tasks and evaluations reported in the last request
        self._lease_size = self._left = 0  #: tasks of the current lease, and its unfinished tasks
        self._closed = threading.Event()

    @override
    def connect(self, plan: TaskPlan) -> None:
        self._beat = WorkerHeartbeat(plan.first, 0, 0.0)
        limit = self._order.job.failure.start_timeout_s

        identity = self._rank, self._attempt
        join = partial(self._transport.call, self._scheduler, "join", *identity, plan)
        ask(self._transport, "join", {_NAME: join}, limit, "start_timeout_s", self._check)
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        """Stop the heartbeat."""
        self._closed.set()

    def count(self, report: StepReport) -> None:
        """Add the times of a step, or task, to the next heartbeat."""
        busy_s = report.seconds.get("data", 0.0) + report.seconds.get("compute", 0.0)
        before = self._beat
        step = max(before.step, report.step + 1)
        self._beat = WorkerHeartbeat(step, before.made + 1, before.busy_s + busy_s)

    @override
    def next(self, alive: Callable[[], None]) -> Lease:
        while True:
            lease = self._wait_for_lease(self._request or self._send_request(), alive)
            self._request = None
            if lease is not None:
                self._number += 1
                self._lease_size = self._left = len(lease.tasks)
                return lease

    @override
    def finish(self, tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()) -> None:
        with self._lock:
            self._tasks += tasks
            self._evaluations += evaluations
        self._left -= len(tasks)
        if self._eager:
            self._send_heartbeat()
        elif self._request is None and 0 < self._left <= max(1, self._lease_size // 4):
            self._request = self._send_request()

    def _send_request(self) -> Any:
        tasks, evaluations = self._finished()
        self._reported = len(tasks), len(evaluations)
        identity = self._rank, self._attempt, self._number
        return self._transport.call(self._scheduler, "work", *identity, tasks, evaluations)

    def _wait_for_lease(self, request: Any, alive: Callable[[], None]) -> Lease | None:
        """
        Wait for the reply to a request for work; None: send the request again.

        Raises:
            ActorLost, DeadlineExceeded: the scheduler is dead, or frozen.
        """
        limit = self._order.job.failure.heartbeat_timeout_s + HOLD_S + ANSWER_GRACE_S
        clock = AwakeClock()
        while not self._transport.wait([request], POLL_S):
            self._check()
            alive()
            if clock.now() > limit:
                setting = "failure.heartbeat_timeout_s"
                raise DeadlineExceeded("the next task", (_NAME,), limit, setting)
        alive()
        try:
            lease: Lease | None = self._transport.get(request, limit)
        except Unanswered:
            time.sleep(RETRY_PAUSE_S)  # the answer was lost; a repeated request gets the same lease
            return None
        except ActorDied as error:
            raise ActorLost(_NAME, None, str(error)) from None
        with self._lock:  # the scheduler has received these
            del self._tasks[: self._reported[0]], self._evaluations[: self._reported[1]]
        return lease

    def _finished(self) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        with self._lock:
            return tuple(self._tasks), tuple(self._evaluations)

    def _send_heartbeat(self) -> None:
        identity = self._rank, self._attempt
        self._transport.call(self._scheduler, "beat", *identity, self._beat, *self._finished())

    def _check(self) -> None:
        if self._abandoned.is_set():
            raise Abandoned(f"rank {self._rank} was told to wait no longer")

    def _send_heartbeats(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            self._send_heartbeat()
