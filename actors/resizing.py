"""
Execution of `distplat scale`: adding and removing workers of a running job.

Synchronous strategies, where all workers train every step together:

    new workers  import, build model and data ──▶ ready
    workers      train ─────────────────────────────────▶│ stop before a step     │ all continue
    controller                                     Resize ┘ orders of next attempt ┘

`platform/scaling.py` and `platform/job.py` decide what to do. The actor group chooses the workers
that leave, and sends the orders. Losing a new worker before it is ready does not affect the others.

`ps-async`, whose workers train independent tasks:

    distplat scale ── request ──▶ controller    join: start worker-4, worker-5
                                      │
                                      └─ dismiss ──▶ task scheduler    worker-3 finishes and ends

A new worker requests tasks from the task scheduler like the others. A leaving worker finishes the
tasks that it holds. Rank 0 never leaves, because its buffers are saved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from distplat.actors.actor_group import ActorGroup
from distplat.actors.ray_errors import Meaning, as_ours, cause_of, meaning
from distplat.actors.spawn import lacks
from distplat.platform.errors import Problem, SpecError, UserCodeError
from distplat.platform.scaling import Resizing, ScaleRequest, ScaleRequests
from distplat.strategies.catalog import strategy_problems

logger = logging.getLogger(__name__)

_REASON_S = 10.0
"""Timeout for fetching the error of a failed call."""


@dataclass
class _Newcomer:
    """A new worker that is building its model and data."""

    call: Callable[[], Any]
    """Sends the order to get ready; idempotent."""
    reply: Any
    deadline: float


class SyncScaler:
    """
    Executes scale requests of synchronous runs, one after the other.

    Args:
        actor_group: actors of the run.
        requests: scale requests.
    """

    def __init__(self, actor_group: ActorGroup, requests: ScaleRequests) -> None:
        self._actors, self._requests = actor_group, requests
        self._resizing = Resizing(actor_group.world)
        self._number = 0  #: of the request that is being executed
        self._calls: dict[int, _Newcomer] = {}  #: by the future rank of the new worker

    @property
    def world(self) -> int:
        """Number of workers of the current attempt."""
        return self._resizing.world

    def refusal(self, workers: int) -> str:
        """Return why the run cannot have `workers` workers; empty: it can."""
        more = workers - self._resizing.world - len(self._resizing.newcomers)
        job = self._actors.job.with_workers(workers)
        for problem in [*job.problems(), *strategy_problems(job)]:
            return f"{problem.field}: {problem.message}"
        return lacks(job, more) if more > 0 else ""

    def all_restarted(self) -> None:
        """Reset after a restart of all actors; a request in progress stays in progress."""
        self._resizing.all_restarted(self._actors.world)
        self._calls.clear()

    def resized(self) -> None:
        """Adopt the actor group's present number of workers."""
        self._resizing.resized(self._actors.world)
        self._calls = {
            rank: newcomer
            for rank, newcomer in self._calls.items()
            if rank in self._resizing.newcomers
        }

    def advance(self, checkpoint_step: int) -> int | None:
        """
        Advance the current request; called at each tick while all workers train.

        Args:
            checkpoint_step: step of the newest checkpoint.

        Returns:
            Number of workers from the next step on; None: no change is due.
        """
        resizing = self._resizing
        request = self._requests.take()
        if request is not None:
            self._take(request)
        for rank in resizing.ranks_to_stop:
            self._drop(rank)
        for rank in resizing.ranks_to_start:
            limit = self._actors.job.failure.start_timeout_s
            call = self._actors.start_newcomer(rank, checkpoint_step)
            self._calls[rank] = _Newcomer(call, call(), time.monotonic() + limit)
            resizing.newcomer_started(rank)
        for rank in list(self._calls):
            if rank in self._calls:  # not dropped with another lost newcomer
                self._check_newcomer(rank)
        if resizing.granted:
            self._answer("")
        return resizing.due

    def _take(self, request: ScaleRequest) -> None:
        refused = self.refusal(request.workers)
        if refused:
            self._requests.answer(request.number, refused)
            return
        self._number = request.number
        self._resizing.request(request.workers)

    def _check_newcomer(self, rank: int) -> None:
        newcomer = self._calls[rank]
        if not ray.wait([newcomer.reply], timeout=0)[0]:
            if time.monotonic() > newcomer.deadline:
                limit = self._actors.job.failure.start_timeout_s
                why = f"it was not ready within `failure.start_timeout_s`, {limit:g} s"
                self._give_up(rank, why)
            return
        try:
            ray.get(newcomer.reply, timeout=_REASON_S)
        except ray.exceptions.RayError as error:
            if meaning(error) in (Meaning.UNANSWERED, Meaning.LATE):
                newcomer.reply = newcomer.call()
                return
            if meaning(error) is not Meaning.RAISED:
                self._give_up(rank, cause_of(error))
                return
            raised = as_ours(error)
            logger.warning("worker-%d: %s", rank, raised)
            text = raised.text if isinstance(raised, UserCodeError) else str(raised)
            self._give_up(rank, text.strip().splitlines()[0])
        else:
            del self._calls[rank]
            self._resizing.newcomer_ready(rank)

    def _give_up(self, rank: int, why: str) -> None:
        """Cancel the request, because a new worker was lost; the run continues unchanged."""
        self._answer(f"worker-{rank} could not be started: {why}")
        for other in list(self._resizing.newcomers):
            self._drop(other)

    def _answer(self, refused: str) -> None:
        self._resizing.cancel()
        self._requests.answer(self._number, refused)

    def _drop(self, rank: int) -> None:
        self._calls.pop(rank, None)
        self._resizing.newcomer_removed(rank)
        self._actors.end_newcomer(rank)


def check_scalable(actor_group: ActorGroup, workers: int) -> None:
    """
    Refuse numbers of workers that the strategy does not support.

    Raises:
        SpecError: the strategy cannot change its number of workers, or not to this one.
    """
    where, most = ("--workers",), actor_group.max_workers
    if not most:
        hint = "stop the job, and resume its last checkpoint with another number: "
        hint += "submit --resume --num-workers N"
        name = actor_group.job.strategy.name
        text = f"strategy {name!r} cannot change its number of workers while it runs"
        raise SpecError(Problem(where, text, hint))
    if not 1 <= workers <= most:
        raise SpecError(Problem(where, f"must be 1 to {most} (got {workers})"))


class AsyncScaler:
    """
    Executes scale requests of asynchronous runs.

    Args:
        actor_group: actors of the run.
        requests: scale requests.
    """

    def __init__(self, actor_group: ActorGroup, requests: ScaleRequests) -> None:
        self._actors, self._requests = actor_group, requests
        self._leaving: set[int] = set()

    def refusal(self, workers: int) -> str:
        """Return why the run cannot have `workers` workers; empty: it can."""
        more = workers - len(self._staying())
        return lacks(self._actors.job, more) if more > 0 else ""

    def all_restarted(self) -> None:
        """Reset after a restart of all actors: no worker is leaving."""
        self._leaving.clear()

    def resend(self) -> None:
        """Send the leaving workers to a new task scheduler."""
        self._actors.order_scheduler("dismiss", tuple(self._leaving))

    def carry_out(self, checkpoint_step: int) -> list[int]:
        """
        Add or remove workers, if a request is pending.

        Args:
            checkpoint_step: step of the newest checkpoint.

        Returns:
            Ranks of the new workers.
        """
        request = self._requests.take()
        if request is None:
            return []
        stay = self._staying()
        change = request.workers - len(stay)
        refused = self.refusal(request.workers)
        joined: list[int] = []
        if change > 0 and not refused:
            joined = self._actors.grow(change, checkpoint_step)
            logger.info("workers join: %s", joined)
        elif change < 0:
            leave = tuple(stay[change:])
            self._leaving.update(leave)
            self._actors.order_scheduler("dismiss", leave)
            logger.info("workers leave: %s", leave)
        self._requests.answer(request.number, refused)
        return joined

    def _staying(self) -> list[int]:
        return sorted(set(self._actors.workers) - self._leaving)

    def left(self, rank: int) -> None:
        """Stop a worker that has finished its last tasks."""
        self._leaving.discard(rank)
        self._actors.end_worker(rank)
        self._actors.order_scheduler("forget", rank)
