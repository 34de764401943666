"""Operations under way in a gloo group, and what they have cost."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import Traffic


class Accounts:
    """
    Keeps a group's `Traffic`. Gloo does not tell waiting from working: all its time is working,
    but for barriers and for the comparison of headers, which are nothing but waiting.

    Args:
        traffic: where figures go.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._lock = threading.Lock()
        self._counted_until = 0.0
        self.under_way = 0
        """Operations that began and did not end well."""

    def begin(self) -> None:
        """Another operation is under way."""
        with self._lock:
            self.under_way += 1

    def end(self, moved: tuple[int, int]) -> None:
        """One is over; `moved`: bytes (sent, received)."""
        with self._lock:
            self.under_way -= 1
            self._traffic.sent_bytes += moved[0]
            self._traffic.received_bytes += moved[1]

    def add(self, part: Traffic) -> None:
        """Take over what a group inside this one has counted."""
        with self._lock:
            self._traffic.sent_bytes += part.sent_bytes
            self._traffic.received_bytes += part.received_bytes
            self._traffic.waiting_s += part.waiting_s
            self._traffic.working_s += part.working_s

    def passed_since(self, started: float) -> None:
        """Count the time since then; once, where operations overlap."""
        with self._lock:
            now = time.perf_counter()
            self._traffic.working_s += max(0.0, now - max(started, self._counted_until))
            self._counted_until = now

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time as waiting."""
        began = time.perf_counter()
        yield
        with self._lock:
            self._traffic.waiting_s += time.perf_counter() - began


class Underway:
    """
    An operation under way (see `Handle`).

    Args:
        works: gloo's; the operation is over when all are.
        accounts: of the group.
        failed: makes the error to raise out of gloo's.
        moved: bytes that this rank (sends, receives).
        after: to be done when the works are over.
    """

    def __init__(
        self,
        works: Sequence[Any],
        accounts: Accounts,
        failed: Callable[[Exception], CollectiveError],
        moved: tuple[int, int],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._works, self._accounts, self._failed = works, accounts, failed
        self._moved, self._after = moved, after
        self._over = self._timed = False
        self._started = time.perf_counter()
        accounts.begin()

    def tell_when_over(self) -> "Underway":
        """Count the time when gloo is done and not only when somebody waits for it."""
        if self._works:
            self._works[-1].get_future().add_done_callback(lambda future: self._time())
        return self

    def wait(self) -> None:
        """Return when the result is there."""
        if self._over:
            return
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise self._failed(error) from None
        self._over = True
        self._time()
        self._accounts.end(self._moved)
        self._after()

    def _time(self) -> None:
        if not self._timed:
            self._timed = True
            self._accounts.passed_since(self._started)
