"""Writes what is told of a run in a thread: a disk that is full or hangs costs lines, not steps."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

MOST = 10_000
"""Records that may wait for the disk."""
CLOSE_S = 10.0
"""How long the end of a run waits for them."""

Record = TypeVar("Record")


class BackgroundWriter(Generic[Record]):
    """
    Hands records on to a thread, in order, and never waits for it.

    The first failure is warned of. Later records are tried all the same, for a disk may have room
    again; at the end it is said how many were lost.

    Args:
        write: writes one record; what it raises costs that record.
        warn: is told of what is lost.
        most: records that may wait; those that come then are lost.
        what: they are, in the plural.
    """

    def __init__(
        self,
        write: Callable[[Record], object],
        warn: Callable[[str], object],
        most: int = MOST,
        what: str = "metrics",
    ) -> None:
        self._write, self._warn, self._what = write, warn, what
        self._waiting: queue.Queue[Record] = queue.Queue(most)
        self._lost = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=what, daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Have a record written."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._lose("the disk does not answer")

    def wait(self, limit_s: float) -> bool:
        """Wait for what is to be written; say whether all of it is."""
        until = time.monotonic() + limit_s
        while self._waiting.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)
        return not self._waiting.unfinished_tasks

    def close(self, limit_s: float = CLOSE_S) -> bool:
        """
        Wait for what is to be written, within reason; warn of what was lost, once.

        Returns:
            Whether the disk answers: nothing waits for it any more.
        """
        idle = self.wait(limit_s)
        lost = self._lost + self._waiting.unfinished_tasks
        if lost and not self._closed:
            self._warn(f"{lost} records of {self._what} were not written")
        self._closed = True
        return idle

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._warn(f"{self._what} are lost, and the run goes on without them: {why}")
        self._lost += 1

    def _work(self) -> None:
        while True:  # a daemon: nobody waits for it longer than `close` does
            record = self._waiting.get()
            try:
                if not self._closed:
                    self._write(record)
            except Exception as error:
                self._lose(str(error) or repr(error))
            finally:
                self._waiting.task_done()
