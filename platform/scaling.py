"""
Another number of workers: requests that come in, and what becomes of one that all ranks share.

    ask(4) ──▶ number 1, pending ── take ──▶ workers are made ── answer ──▶ granted, or why not

Where all ranks make every step together they change at the same step (`Resizing`):

    request 4     worker-2 and worker-3 are made, and the run goes on with two
    both ready    due: the run is to stop before one step, and to go on with four
    one lost      the request is given up, the other newcomer ended; the run went on all the time
    request 1     nobody is to be made: due at once

A later request takes the place of an earlier one; who is being made and is still wanted, stays. The
classes read no clock and talk to nobody.
"""

import threading
from dataclasses import dataclass


class Resizing:
    """
    Who is made ready to join, and when the number is to change.

    Args:
        world: ranks that there are.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.wanted: int | None = None  #: ranks that there are to be; None: no request is open
        self.newcomers: dict[int, bool] = {}  #: rank -> whether it is ready

    def request(self, workers: int) -> None:
        """Request a change to `workers` ranks."""
        self.wanted = workers

    def cancel(self) -> None:
        """The request cannot be granted."""
        self.wanted = None

    @property
    def ranks_to_start(self) -> list[int]:
        """Ranks of newcomers that are wanted and not started yet."""
        wanted = range(self.world, self.wanted or 0)
        return [rank for rank in wanted if rank not in self.newcomers]

    @property
    def ranks_to_stop(self) -> list[int]:
        """Newcomers that are not wanted any more."""
        wanted = range(self.world, self.wanted or 0)
        return [rank for rank in self.newcomers if rank not in wanted]

    def newcomer_started(self, rank: int) -> None:
        """A newcomer was asked for; it is starting."""
        self.newcomers[rank] = False

    def newcomer_ready(self, rank: int) -> None:
        """It could begin at once."""
        self.newcomers[rank] = True

    def newcomer_removed(self, rank: int) -> None:
        """It was let go, or is lost."""
        self.newcomers.pop(rank, None)

    @property
    def due(self) -> int | None:
        """Ranks to go on with, when there is nothing more to wait for; None: go on as it is."""
        if self.wanted is None or self.wanted == self.world:
            return None
        wanted = range(self.world, self.wanted)
        return self.wanted if all(self.newcomers.get(rank) for rank in wanted) else None

    @property
    def granted(self) -> bool:
        """Whether there are as many as were requested."""
        return self.wanted == self.world

    def resized(self, world: int) -> None:
        """The run goes on with so many ranks; newcomers among them are no newcomers any more."""
        self.world = world
        self.newcomers = {rank: r for rank, r in self.newcomers.items() if rank >= world}

    def all_restarted(self, world: int) -> None:
        """All processes were made anew, newcomers went with them; the request stands."""
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
    """What became of the last request."""

    request: ScaleRequest | None = None
    """None: nobody has asked."""
    refused: str = ""
    """Why it was not granted; empty: it was, or is about to be."""
    pending: bool = False
    """Whether it is still to be answered."""


NO_SCALE_REQUEST = ScaleStatus()


class ScaleRequests:
    """The requests of one run; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status = ScaleStatus()
        self._taken = 0  #: number of the last request that was taken

    def ask(self, workers: int) -> ScaleRequest:
        """Note a request; the one before counts no more."""
        with self._lock:
            before = self._status.request
            request = ScaleRequest(1 if before is None else before.number + 1, workers)
            self._status = ScaleStatus(request, pending=True)
            return request

    def take(self) -> ScaleRequest | None:
        """Give the last request, once; None: there is no new one."""
        with self._lock:
            last = self._status.request
            if last is None or last.number == self._taken:
                return None
            self._taken = last.number
            return last

    def answer(self, number: int, refused: str) -> None:
        """Note what became of a request, unless there is a later one; no reason: it is granted."""
        with self._lock:
            last = self._status.request
            if last is not None and last.number == number:
                self._status = ScaleStatus(last, refused)

    def status(self) -> ScaleStatus:
        """Tell what became of the last request."""
        with self._lock:
            return self._status
