"""
Statistics of a run's workers: heartbeats, speeds and stragglers.

A worker reports its finished steps and its working time, without waits for others. In a synchronous
run all workers do the same number of steps, so only the working time shows which one is slow.

    time         0.0    0.5    1.0    1.5
    worker-0     10     15     20     25 tasks, 0.10 s of work each
    worker-1      3      4      5      6 tasks, 0.50 s             more than twice the median

The class reads no clock and does no I/O.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median_low

WINDOW_S = 10.0
"""Window over which speed is measured."""
STRAGGLER_FACTOR = 2.0
"""A worker is a straggler if its steps take this factor times the (lower) median."""
_MIN_STEPS = 3
"""Fewest steps in the window for a speed."""


@dataclass(frozen=True)
class WorkerHeartbeat:
    """Counters of a worker, monotonic within an attempt."""

    step: int
    """Highest step of the run that it reached."""
    made: int
    """Steps, or leased tasks, done in this attempt."""
    busy_s: float
    """Time of data loading, forward and backward in these."""


@dataclass(frozen=True)
class WorkerStats:
    """Statistics of one worker."""

    rank: int
    step: int
    made: int
    per_s: float | None
    """Steps, or leased tasks, per second; None: too few."""
    step_s: float | None
    """Working time per step or task, without waits."""
    silent_s: float
    """Time since its last heartbeat."""
    straggler: bool


class WorkerTable:
    """Statistics of the workers of one run."""

    def __init__(self) -> None:
        self._beats: dict[int, deque[tuple[float, WorkerHeartbeat]]] = {}
        self._base: dict[int, int] = {}  #: rank -> steps done in earlier attempts

    @property
    def ranks(self) -> set[int]:
        """All known ranks."""
        return set(self._beats)

    def add_heartbeat(self, rank: int, beat: WorkerHeartbeat, now: float) -> None:
        """Add a heartbeat; one that arrives out of order is ignored."""
        beats = self._beats.setdefault(rank, deque())
        if beats and beat.made < beats[-1][1].made:
            return
        beats.append((now, beat))
        while len(beats) > 2 and beats[1][0] < now - WINDOW_S:
            beats.popleft()

    def begin(self, rank: int, now: float) -> None:
        """Start a worker's attempt: its counters restart at 0."""
        before = self._beats.get(rank)
        if before:
            self._base[rank] = self._base.get(rank, 0) + before[-1][1].made
        step = before[-1][1].step if before else 0
        self._beats[rank] = deque([(now, WorkerHeartbeat(step, 0, 0.0))])

    def keep_only(self, ranks: range) -> None:
        """Forget all other ranks, after the number of workers was reduced."""
        for rank in self.ranks - {*ranks}:
            self.forget(rank)

    def forget(self, rank: int) -> None:
        """Forget a worker that left."""
        self._beats.pop(rank, None)
        self._base.pop(rank, None)  # another process may get this rank

    def silent(self, now: float, limit_s: float) -> list[int]:
        """Return the ranks without a heartbeat for longer than `limit_s`."""
        return [rank for rank, beats in self._beats.items() if now - beats[-1][0] > limit_s]

    def step_s(self, rank: int) -> float | None:
        """Return a worker's working time per step or task, without waits; None: too few."""
        beats = self._beats.get(rank)
        if not beats:
            return None
        first, last = beats[0][1], beats[-1][1]
        steps = last.made - first.made
        return (last.busy_s - first.busy_s) / steps if steps >= _MIN_STEPS else None

    def wall_s(self, rank: int) -> float | None:
        """Return a worker's time per step or task, including waits; None: too few."""
        if self.step_s(rank) is None:
            return None
        (began, first), (ended, last) = self._beats[rank][0], self._beats[rank][-1]
        return (ended - began) / (last.made - first.made)

    def stats(self, now: float) -> list[WorkerStats]:
        """Return the statistics of all workers, in rank order."""
        paces = {rank: self.step_s(rank) for rank in self._beats}
        known_paces = [pace for pace in paces.values() if pace is not None]
        median_pace = median_low(known_paces) if known_paces else 0.0
        rows = []
        for rank, beats in sorted(self._beats.items()):
            heard_at, last = beats[-1]
            pace, wall_s = paces[rank], self.wall_s(rank)
            per_s = 1 / wall_s if wall_s else None
            slow = pace is not None and pace > STRAGGLER_FACTOR * median_pace > 0
            before = self._base.get(rank, 0)
            rows.append(
                WorkerStats(rank, last.step, before + last.made, per_s, pace, now - heard_at, slow)
            )
        return rows
