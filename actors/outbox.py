"""
What an actor tells whoever asks it, each thing once, though questions and answers may be lost.

    asks        poll 1 ──▶      poll 2 ──▶      poll 2 ──▶      poll 3 ──▶
    is told     ◀── a, b        (lost) ── c     ◀── c           ◀── d

Questions are numbered by who asks. The same number gets the same answer; only the next one lets
go of it.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Outbox(Generic[Item]):
    """Things to be told, from any thread, to one who asks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._fresh: deque[Item] = deque()
        self._last: list[Item] = []  #: the answer to the last question
        self._number = 0  #: of that
        self._closed = False

    def put(self, item: Item) -> None:
        """Have something told."""
        with self._changed:
            self._fresh.append(item)
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come: nobody is to wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def drained(self) -> bool:
        """Whether all has been told that will ever be."""
        with self._changed:
            return self._closed and not self._fresh

    def take(self, number: int, hold_s: float = 0.0) -> list[Item]:
        """
        Answer a question; one that came late, after the next one, gets nothing.

        Args:
            number: of the question, from 1.
            hold_s: how long to wait for something to tell.
        """
        answerable = lambda: self._fresh or self._closed or number <= self._number  # noqa: E731
        with self._changed:
            self._changed.wait_for(answerable, hold_s)
            if number > self._number:
                self._number, self._last = number, list(self._fresh)
                self._fresh.clear()
            return list(self._last) if number == self._number else []
