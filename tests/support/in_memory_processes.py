"""
Processes of a cluster in memory: a process is a name that its threads inherit.

One that is killed answers no more, and its threads come out at their next call to Ray. A frozen one
stands still then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

_here = threading.local()


class Killed(BaseException):
    """Ends the threads of a process that is no more."""


class Process:
    """
    A process of the cluster.

    Args:
        name: of its actor, or `driver`.
        node: where it is.
        owner: whose end is its end, too.
    """

    def __init__(self, name: str, node: str, owner: Process | None) -> None:
        self.name, self.node, self.owner = name, node, owner
        self.dead: Future[None] = Future()  #: done once it is killed
        self._running = threading.Event()
        self._running.set()

    def check(self) -> None:
        """Stand still while the process is frozen; raises `Killed` once it is dead."""
        self._running.wait()
        if self.dead.done():
            raise Killed(self.name)

    def freeze(self) -> None:
        """Have its threads stand still, and its actor answer nobody."""
        self._running.clear()

    def go_on(self) -> None:
        """Have it go on."""
        self._running.set()

    def end(self) -> None:
        """Have its threads come out."""
        if not self.dead.done():
            self.dead.set_result(None)
        self._running.set()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have what is called in this block be of this process."""
        before = getattr(_here, "process", None)
        _here.process = self
        try:
            yield
        finally:
            _here.process = before


def this_process() -> Process:
    """Give the process that the calling thread is of; raises `Killed` if it is dead."""
    process: Process = _here.process
    process.check()
    return process


def process_here() -> Process | None:
    """Give the process that the calling thread is of; None: it is of none."""
    return getattr(_here, "process", None)
