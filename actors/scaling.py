"""
Workers that join and leave while a run goes on: carries out what `distplat scale` asks for.

    distplat scale ── request ──▶ controller    joins: make worker-4, worker-5
                                      │
                                      └─ dismiss ──▶ task scheduler    worker-3 finishes, is ended

Others are not disturbed: a newcomer asks the task scheduler for work like everybody else, and who
leaves finishes what it holds. Rank 0 stays: it has the buffers that are saved.
"""

from __future__ import annotations

import logging

from distplat.actors.actor_group import ActorGroup
from distplat.actors.spawn import lacks
from distplat.platform.errors import Problem, SpecError
from distplat.platform.scale_requests import ScaleRequests

logger = logging.getLogger(__name__)


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


class Scaler:
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
        """Say why there cannot be so many workers; empty: there can."""
        more = workers - len(self._staying())
        return lacks(self._actors.job, more) if more > 0 else ""

    def begin_anew(self) -> None:
        """All actors are made anew: nobody is leaving any more."""
        self._leaving.clear()

    def tell_again(self) -> None:
        """The task scheduler is another one: it does not know who is leaving."""
        self._actors.tell_scheduler("dismiss", tuple(self._leaving))

    def carry_out(self, base: int) -> list[int]:
        """
        Have workers join or leave, if that is asked for.

        Args:
            base: steps of the newest checkpoint.

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
            joined = self._actors.grow(more, base)
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
        self._actors.part_with(rank)
        self._actors.tell_scheduler("gone", rank)
