"""
Carries out `distplat scale`: more or fewer workers while a run goes on.

Under `ps-sync`, where all workers make every step together:

    newcomers    import, build model and data ──▶ ready
    the others   train ─────────────────────────────────▶│ stop before one step   │ all go on
    controller                                     Resize ┘ next attempt's orders ┘

What is to be done is decided in `platform/scaling.py` and `platform/job.py`; who leaves, and the
orders, are the actor group's. A newcomer that is lost before it is ready disturbs nobody.

Under `ps-async`, whose workers have no step in common, others are not disturbed:

    distplat scale ── request ──▶ controller    joins: make worker-4, worker-5
                                      │
                                      └─ dismiss ──▶ task scheduler    worker-3 finishes, is ended

A newcomer asks the task scheduler for work like everybody else, and who leaves finishes what it
holds. Rank 0 stays: it has the buffers that are saved.
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
"""How long the reason may take to come of a call that has failed."""


@dataclass
class _Newcomer:
    """A newcomer that makes itself ready."""

    call: Callable[[], Any]
    """Asks it for that, again if need be."""
    reply: Any
    until: float


class SyncScaler:
    """
    Carries out requests for another number of workers, one after the other.

    Args:
        actor_group: the run's actors.
        requests: for another number.
    """

    def __init__(self, actor_group: ActorGroup, requests: ScaleRequests) -> None:
        self._actors, self._requests = actor_group, requests
        self._resizing = Resizing(actor_group.world)
        self._number = 0  #: of the request that is being carried out
        self._calls: dict[int, _Newcomer] = {}  #: by the rank that the newcomer is to have

    @property
    def world(self) -> int:
        """Workers that the run goes on with."""
        return self._resizing.world

    def refusal(self, workers: int) -> str:
        """Give the reason why there cannot be `workers` workers; empty: there can."""
        more = workers - self._resizing.world - len(self._resizing.newcomers)
        job = self._actors.job.with_workers(workers)
        for problem in [*job.problems(), *strategy_problems(job)]:
            return f"{problem.field}: {problem.message}"
        return lacks(job, more) if more > 0 else ""

    def all_restarted(self) -> None:
        """All actors were made anew; a request that is under way stands."""
        self._resizing.all_restarted(self._actors.world)
        self._calls.clear()

    def resized(self) -> None:
        """The run goes on with as many workers as the actor group has now."""
        self._resizing.resized(self._actors.world)
        self._calls = {
            rank: c for rank, c in self._calls.items() if rank in self._resizing.newcomers
        }

    def look(self, checkpoint_step: int) -> int | None:
        """
        Carry on; called while all workers are at work.

        Args:
            checkpoint_step: steps of the newest checkpoint.

        Returns:
            Workers to go on with from the next step; None: nothing is to change now.
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
            if rank in self._calls:  # else it was let go with one that was lost
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
        coming = self._calls[rank]
        if not ray.wait([coming.reply], timeout=0)[0]:
            if time.monotonic() > coming.until:
                limit = self._actors.job.failure.start_timeout_s
                why = f"it was not ready within `failure.start_timeout_s`, {limit:g} s"
                self._give_up(rank, why)
            return
        try:
            ray.get(coming.reply, timeout=_REASON_S)
        except ray.exceptions.RayError as error:
            if meaning(error) in (Meaning.UNANSWERED, Meaning.LATE):
                coming.reply = coming.call()
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
        """A newcomer is lost: the run goes on as it was."""
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
    Refuse what no cluster could give.

    Raises:
        SpecError: the strategy cannot change its number of workers, or not to this one.
    """
    where, most = ("--workers",), actor_group.most_workers
    if not most:
        hint = "stop the job, and go on from its last checkpoint with another number: "
        hint += "submit --resume --num-workers N"
        name = actor_group.job.strategy.name
        text = f"strategy {name!r} cannot change its number of workers while it runs"
        raise SpecError(Problem(where, text, hint))
    if not 1 <= workers <= most:
        raise SpecError(Problem(where, f"must be 1 to {most} (got {workers})"))


class AsyncScaler:
    """
    The workers of one run, as many as were asked for.

    Args:
        actor_group: its actors.
        requests: for more or fewer.
    """

    def __init__(self, actor_group: ActorGroup, requests: ScaleRequests) -> None:
        self._actors, self._requests = actor_group, requests
        self._leaving: set[int] = set()

    def refusal(self, workers: int) -> str:
        """Give the reason why there cannot be `workers` workers; empty: there can."""
        more = workers - len(self._staying())
        return lacks(self._actors.job, more) if more > 0 else ""

    def all_restarted(self) -> None:
        """All actors were restarted: no worker is leaving any more."""
        self._leaving.clear()

    def tell_again(self) -> None:
        """Tell a new task scheduler which workers are leaving."""
        self._actors.tell_scheduler("dismiss", tuple(self._leaving))

    def carry_out(self, checkpoint_step: int) -> list[int]:
        """
        Have workers join or leave, if that is asked for.

        Args:
            checkpoint_step: steps of the newest checkpoint.

        Returns:
            Ranks that are starting.
        """
        request = self._requests.take()
        if request is None:
            return []
        stay = self._staying()
        more = request.workers - len(stay)
        refused = self.refusal(request.workers)
        joined: list[int] = []
        if more > 0 and not refused:
            joined = self._actors.grow(more, checkpoint_step)
            logger.info("workers join: %s", joined)
        elif more < 0:
            leave = tuple(stay[more:])
            self._leaving.update(leave)
            self._actors.tell_scheduler("dismiss", leave)
            logger.info("workers leave: %s", leave)
        self._requests.answer(request.number, refused)
        return joined

    def _staying(self) -> list[int]:
        return sorted(set(self._actors.workers) - self._leaving)

    def left(self, rank: int) -> None:
        """End a worker that has finished what it had."""
        self._leaving.discard(rank)
        self._actors.end_worker(rank)
        self._actors.tell_scheduler("forget", rank)
