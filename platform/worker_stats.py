"""
How the workers of a run are doing: who is heard of, how fast each one works, who falls behind.

A worker tells now and then what it has made and how long it worked on it, without the waits for
others: in a synchronous run all make the same number of steps, and only that tells who is slow.

    told at      0.0    0.5    1.0    1.5
    worker-0     10     15     20     25 tasks, 0.10 s of work each
    worker-1      3      4      5      6 tasks, 0.50 s             more than twice the median

The class reads no clock and talks to nobody.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median_low

WINDOW_S = 10.0
"""Speed is that of so many seconds."""
STRAGGLER_FACTOR = 2.0
"""A worker is marked whose step takes more than so many times the (lower) median."""
_LEAST_STEPS = 3
"""Steps in the window that a worker's speed needs at least."""


@dataclass(frozen=True)
class WorkerHeartbeat:
    """A worker's counters; every figure only grows in an attempt."""

    step: int
    """The furthest of the run that it has been at."""
    made: int
    """Steps, or leased tasks, in this attempt."""
    busy_s: float
    """What data, forward and backward of these took."""


@dataclass(frozen=True)
class WorkerStats:
    """How one worker is doing."""

    rank: int
    step: int
    made: int
    per_s: float | None
    """Steps, or leased tasks, that it makes in a second; None: too few to say."""
    step_s: float | None
    """Work on one of them, without waits."""
    silent_s: float
    """Since it was last heard of."""
    straggler: bool


class WorkerTable:
    """The workers of one run."""

    def __init__(self) -> None:
        self._beats: dict[int, deque[tuple[float, WorkerHeartbeat]]] = {}
        self._base: dict[int, int] = {}  #: rank -> what it made in earlier attempts

    @property
    def ranks(self) -> set[int]:
        """All that are there."""
        return set(self._beats)

    def heard(self, rank: int, beat: WorkerHeartbeat, now: float) -> None:
        """Take what a worker tells; news that overtook each other on their way are passed over."""
        beats = self._beats.setdefault(rank, deque())
        if beats and beat.made < beats[-1][1].made:
            return
        beats.append((now, beat))
        while len(beats) > 2 and beats[1][0] < now - WINDOW_S:
            beats.popleft()

    def begin(self, rank: int, now: float) -> None:
        """A worker begins an attempt: its figures begin at 0."""
        before = self._beats.get(rank)
        if before:
            self._base[rank] = self._base.get(rank, 0) + before[-1][1].made
        step = before[-1][1].step if before else 0
        self._beats[rank] = deque([(now, WorkerHeartbeat(step, 0, 0.0))])

    def keep(self, ranks: range) -> None:
        """Forget all others: there are fewer workers now."""
        for rank in self.ranks - {*ranks}:
            self.forget(rank)

    def forget(self, rank: int) -> None:
        """A worker has left."""
        self._beats.pop(rank, None)
        self._base.pop(rank, None)  # another process may come to have this rank

    def silent(self, now: float, limit_s: float) -> list[int]:
        """Give the ranks without a heartbeat for longer than `limit_s`."""
        return [rank for rank, beats in self._beats.items() if now - beats[-1][0] > limit_s]

    def step_s(self, rank: int) -> float | None:
        """Give what a step, or task, takes a worker, without waits; None: too few to say."""
        beats = self._beats.get(rank)
        if not beats:
            return None
        first, last = beats[0][1], beats[-1][1]
        steps = last.made - first.made
        return (last.busy_s - first.busy_s) / steps if steps >= _LEAST_STEPS else None

    def wall_s(self, rank: int) -> float | None:
        """Give what a step, or task, takes a worker from one to the next; None: see `step_s`."""
        if self.step_s(rank) is None:
            return None
        (began, first), (ended, last) = self._beats[rank][0], self._beats[rank][-1]
        return (ended - began) / (last.made - first.made)

    def stats(self, now: float) -> list[WorkerStats]:
        """Tell how all are doing, in the order of their ranks."""
        paces = {rank: self.step_s(rank) for rank in self._beats}
        known = [pace for pace in paces.values() if pace is not None]
        usual = median_low(known) if known else 0.0
        rows = []
        for rank, beats in sorted(self._beats.items()):
            heard_at, last = beats[-1]
            pace, wall_s = paces[rank], self.wall_s(rank)
            per_s = 1 / wall_s if wall_s else None
            slow = pace is not None and pace > STRAGGLER_FACTOR * usual > 0
            before = self._base.get(rank, 0)
            rows.append(
                WorkerStats(rank, last.step, before + last.made, per_s, pace, now - heard_at, slow)
            )
        return rows
