"""
Changing the number of workers: requests, and the state of a resize.

    submit(4) ──▶ number 1, pending ── take ──▶ workers are started ── answer ──▶ granted or refused

Where all ranks do every step together, they change at the same step (`Resizing`):

    request 4     worker-2 and worker-3 start, and the run continues with two
    both ready    due: the run stops after a step, and continues with four
    one lost      the request is canceled, the other newcomer stopped; the run was never stopped
    request 1     no worker has to start: due at once

A later request replaces an earlier one; newcomers that are still needed are kept. The classes read
no clock and do no I/O.
"""

import threading
from dataclasses import dataclass


class Resizing:
    """
    State of a resize: which newcomers are starting, and when the number of ranks changes.

    Args:
        world: present number of ranks.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.target: int | None = None  #: requested number of ranks; None: no open request
        self.newcomers: dict[int, bool] = {}  #: rank -> whether it is ready

    def request(self, workers: int) -> None:
        """Request a change to `workers` ranks."""
        self.target = workers

    def cancel(self) -> None:
        """Cancel the request."""
        self.target = None

    @property
    def ranks_to_start(self) -> list[int]:
        """Ranks of newcomers that are needed and not started."""
        needed = range(self.world, self.target or 0)
        return [rank for rank in needed if rank not in self.newcomers]

    @property
    def ranks_to_stop(self) -> list[int]:
        """Ranks of newcomers that are no longer needed."""
        needed = range(self.world, self.target or 0)
        return [rank for rank in self.newcomers if rank not in needed]

    def newcomer_started(self, rank: int) -> None:
        """Record that a newcomer is starting."""
        self.newcomers[rank] = False

    def newcomer_ready(self, rank: int) -> None:
        """Record that a newcomer is ready to train."""
        self.newcomers[rank] = True

    def newcomer_removed(self, rank: int) -> None:
        """Record that a newcomer was stopped or lost."""
        self.newcomers.pop(rank, None)

    @property
    def due(self) -> int | None:
        """New number of ranks, once all newcomers are ready; None: no change is due."""
        if self.target is None or self.target == self.world:
            return None
        needed = range(self.world, self.target)
        return self.target if all(self.newcomers.get(rank) for rank in needed) else None

    @property
    def granted(self) -> bool:
        """Whether the number of ranks is the requested one."""
        return self.target == self.world

    def resized(self, world: int) -> None:
        """Record the new number of ranks; newcomers among them become regular ranks."""
        self.world = world
        self.newcomers = {rank: r for rank, r in self.newcomers.items() if rank >= world}

    def all_restarted(self, world: int) -> None:
        """Record that all processes were replaced, without newcomers; the request stays open."""
        self.world = world
        self.newcomers = {}


@dataclass(frozen=True)
class ScaleRequest:
    """A request for a number of workers."""

    number: int
    """Number of the request, from 1."""
    workers: int


@dataclass(frozen=True)
class ScaleStatus:
    """Status of the last request."""

    request: ScaleRequest | None = None
    """None: there was no request."""
    refused: str = ""
    """Why the request was refused; empty: it was not."""
    pending: bool = False
    """Whether the request is still open."""


NO_SCALE_REQUEST = ScaleStatus()


class ScaleRequests:
    """Requests of one run; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status = ScaleStatus()
        self._taken = 0  #: number of the last request returned by `take`

    def submit(self, workers: int) -> ScaleRequest:
        """Submit a request; it replaces an earlier one."""
        with self._lock:
            before = self._status.request
            request = ScaleRequest(1 if before is None else before.number + 1, workers)
            self._status = ScaleStatus(request, pending=True)
            return request

    def take(self) -> ScaleRequest | None:
        """Return the last request, once; None: no new request."""
        with self._lock:
            last = self._status.request
            if last is None or last.number == self._taken:
                return None
            self._taken = last.number
            return last

    def answer(self, number: int, refused: str) -> None:
        """Record the outcome of a request, unless a later one exists; empty: granted."""
        with self._lock:
            last = self._status.request
            if last is not None and last.number == number:
                self._status = ScaleStatus(last, refused)

    def status(self) -> ScaleStatus:
        """Return the status of the last request."""
        with self._lock:
            return self._status
