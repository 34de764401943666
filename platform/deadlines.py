"""When a rank has been silent, or busy, for too long; and how that is told."""

from collections.abc import Iterable

from distplat.platform.errors import ActorLost
from distplat.platform.spec import Failure

STALL_GRACE = 1.25
"""A stalled rank is given this much more than `step_timeout_s`: its peers' own time-outs inside
the exchange come first and know more."""


class Beats:
    """
    How far each rank says that it has come, and when that last grew.

    Args:
        ranks: those that there are.
        now: seconds on any clock that never goes back.
    """

    def __init__(self, ranks: Iterable[int], now: float) -> None:
        self._count = dict.fromkeys(ranks, 0)  #: 0: it has just joined
        self._moved_at = dict.fromkeys(self._count, now)

    def join(self, rank: int, now: float) -> None:
        """There is one more."""
        self._count[rank], self._moved_at[rank] = 0, now

    def leave(self, rank: int) -> None:
        """It is no more."""
        self._count.pop(rank, None)
        self._moved_at.pop(rank, None)

    def hear(self, rank: int, count: int, now: float) -> None:
        """A rank tells its beats; it has moved if they are more than before."""
        if count > self._count[rank]:
            self._count[rank], self._moved_at[rank] = count, now

    @property
    def still(self) -> list[int]:
        """Ranks that have not yet moved."""
        return [rank for rank, count in self._count.items() if not count]

    def stalled(self, working: Iterable[int], now: float, limits: Failure) -> tuple[int, ...]:
        """
        Give the ranks that have not moved for longer than they may.

        Args:
            working: ranks that should.
            now: on the same clock.
            limits: the job's deadlines.
        """
        step_s, start_s = limits.step_timeout_s, max(limits.step_timeout_s, limits.start_timeout_s)
        patience_s = {rank: step_s if self._count[rank] else start_s for rank in working}
        return tuple(
            rank
            for rank, seconds in patience_s.items()
            if now - self._moved_at[rank] > seconds * STALL_GRACE
        )


def frozen(role: str, seconds: float, step: int | None) -> ActorLost:
    """Tell of a role that does not answer."""
    cause = f"it has not answered for {seconds:.0f} s (frozen or cut off)"
    return ActorLost(role, step, cause, "`failure.heartbeat_timeout_s` changes this deadline")


def rank_of(role: str) -> int | None:
    """Give the rank of a worker's role; None for servers and their manager."""
    kind, _, number = role.partition("-")
    return int(number) if kind == "worker" and number.isdigit() else None
