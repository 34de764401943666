"""
Workers that join and leave while a run goes on: carries out what `distplat scale` wishes for.

    distplat scale ── wish ──▶ task scheduler ── poll ──▶ controller
                                    ▲                        │ joins: make worker-4, worker-5
                                    └── dismiss, answer ─────┘ leaves: worker-3 finishes, is ended

Others are not disturbed: a newcomer asks the task scheduler for work like everybody else, and who
leaves finishes what it holds. Rank 0 stays: it has the buffers that are saved.
"""

from __future__ import annotations

import logging

from distplat.actors.actor_group import ActorGroup
from distplat.actors.servers.scheduler import ScaleRequest
from distplat.actors.spawn import lacks

logger = logging.getLogger(__name__)


class Scaling:
    """
    The workers of one run, as many as were wished for.

    Args:
        actor_group: its actors.
    """

    def __init__(self, actor_group: ActorGroup) -> None:
        self._actors = actor_group
        self._wish: ScaleRequest | None = None
        self._leaving: set[int] = set()

    def hear(self, wish: ScaleRequest) -> None:
        """Take a wish; the same one comes again until it is answered."""
        self._wish = wish

    def begin_anew(self) -> None:
        """All actors are made anew: nobody is leaving any more."""
        self._wish = None
        self._leaving.clear()

    def tell_again(self) -> None:
        """The task scheduler is another one: it does not know who is leaving."""
        self._wish = None
        self._actors.scheduler.dismiss.remote(tuple(self._leaving))

    def carry_out(self, base: int) -> list[int]:
        """
        Have workers join or leave, if there is a wish.

        Args:
            base: steps of the newest checkpoint.

        Returns:
            Ranks that are starting.
        """
        wish, self._wish = self._wish, None
        if wish is None:
            return []
        stay = sorted(set(self._actors.workers) - self._leaving)
        more = wish.workers - len(stay)
        refused = lacks(self._actors.job, more) if more > 0 else ""
        joined: list[int] = []
        if more > 0 and not refused:
            joined = self._actors.grow(more, base)
            logger.info("workers join: %s", joined)
        elif more < 0:
            leave = tuple(stay[more:])
            self._leaving.update(leave)
            self._actors.scheduler.dismiss.remote(leave)
            logger.info("workers leave: %s", leave)
        self._actors.scheduler.answer.remote(wish.number, refused)
        return joined

    def left(self, rank: int) -> None:
        """End a worker that has finished what it had."""
        self._leaving.discard(rank)
        self._actors.part_with(rank)
        self._actors.scheduler.gone.remote(rank)
