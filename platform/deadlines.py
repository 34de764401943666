"""When a rank has been silent, or busy, for too long; and how that is told."""

from collections.abc import Mapping

from distplat.platform.errors import ActorLost
from distplat.platform.spec import Failure

STALL_GRACE = 1.25
"""A stalled rank is given this much more than `step_timeout_s`: its peers' own time-outs inside
the exchange come first and know more."""


def stalled(
    progress: Mapping[int, int], quiet: Mapping[int, float], limits: Failure
) -> tuple[int, ...]:
    """
    Give the ranks that have not moved for longer than they may.

    Args:
        progress: beats of the ranks that are at work; 0: it has just joined.
        quiet: seconds since each of them moved.
        limits: the job's deadlines.
    """
    start = max(limits.step_timeout_s, limits.start_timeout_s)
    patience = {rank: limits.step_timeout_s if beats else start for rank, beats in progress.items()}
    return tuple(rank for rank in progress if quiet[rank] > patience[rank] * STALL_GRACE)


def frozen(role: str, seconds: float, step: int | None) -> ActorLost:
    """Tell of a role that does not answer."""
    cause = f"it has not answered for {seconds:.0f} s (frozen or cut off)"
    return ActorLost(role, step, cause, "`failure.heartbeat_timeout_s` changes this deadline")


def rank_of(role: str) -> int | None:
    """Give the rank of a worker's role; None for servers and their manager."""
    kind, _, number = role.partition("-")
    return int(number) if kind == "worker" and number.isdigit() else None
