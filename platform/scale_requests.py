"""
Requests for another number of workers of one run: any thread asks, the controller takes them.

    ask(4) ──▶ number 1, pending ── take ──▶ workers are made ── answer ──▶ granted, or why not

A later request takes the place of an earlier one.
"""

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleRequest:
    """A number of workers that somebody has asked for."""

    number: int
    """Of the request, from 1."""
    workers: int


@dataclass(frozen=True)
class ScaleStatus:
    """What became of the last request."""

    wish: ScaleRequest | None = None
    """None: nobody has asked."""
    refused: str = ""
    """Why it was not granted; empty: it was, or is about to be."""
    pending: bool = False
    """Whether it is still to be answered."""


NOBODY_ASKED = ScaleStatus()


class ScaleRequests:
    """The requests of one run; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status = ScaleStatus()
        self._taken = 0  #: number of the last request that was taken

    def ask(self, workers: int) -> ScaleRequest:
        """Note a request; the one before counts no more."""
        with self._lock:
            before = self._status.wish
            request = ScaleRequest(1 if before is None else before.number + 1, workers)
            self._status = ScaleStatus(request, pending=True)
            return request

    def take(self) -> ScaleRequest | None:
        """Give the last request, once; None: there is no new one."""
        with self._lock:
            wish = self._status.wish
            if wish is None or wish.number == self._taken:
                return None
            self._taken = wish.number
            return wish

    def answer(self, number: int, refused: str) -> None:
        """Note what became of a request, unless there is a later one; no reason: it is granted."""
        with self._lock:
            wish = self._status.wish
            if wish is not None and wish.number == number:
                self._status = ScaleStatus(wish, refused)

    def status(self) -> ScaleStatus:
        """Tell what became of the last request."""
        with self._lock:
            return self._status
