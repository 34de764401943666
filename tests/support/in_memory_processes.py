"""
Processes of an in-memory cluster: a process is a name that its threads inherit.

A killed process does not answer, and its threads end at their next call to Ray. Threads of a frozen
process block at that call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

_here = threading.local()


class Killed(BaseException):
    """Ends the threads of a killed process."""


class Process:
    """
    A process of the cluster.

    Args:
        name: name of the actor, or `driver`.
        node: node of the process.
        owner: creator; this process ends with it.
    """

    def __init__(self, name: str, node: str, owner: Process | None) -> None:
        self.name, self.node, self.owner = name, node, owner
        self.dead: Future[None] = Future()  #: done once the process is killed
        self._running = threading.Event()
        self._running.set()

    def check(self) -> None:
        """Block while the process is frozen; raises `Killed` once it is dead."""
        self._running.wait()
        if self.dead.done():
            raise Killed(self.name)

    def freeze(self) -> None:
        """Block the threads of the process, and calls to its actor."""
        self._running.clear()

    def resume(self) -> None:
        """Resume the process."""
        self._running.set()

    def end(self) -> None:
        """End the threads of the process."""
        if not self.dead.done():
            self.dead.set_result(None)
        self._running.set()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run the calls of the block in this process."""
        before = getattr(_here, "process", None)
        _here.process = self
        try:
            yield
        finally:
            _here.process = before


def this_process() -> Process:
    """Return the process of the calling thread; raises `Killed` if it is dead."""
    process: Process = _here.process
    process.check()
    return process


def process_here() -> Process | None:
    """Return the process of the calling thread; None: the thread has none."""
    return getattr(_here, "process", None)
