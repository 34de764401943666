"""
The process that trains, and forks of it, which have its memory and connections.

A child that a task forks, and that comes back from the task's code, would train on beside the
worker: into the same shared memory and through the same sockets, as the same rank. So it ends.
"""

from __future__ import annotations

import os
from types import TracebackType

_MESSAGE = (
    "E process %d, which the task forked from the training process %d, has left the task's code, "
    "and ends here: training goes on in %d alone. End such a process with os._exit() in the task\n"
)


class ForkGuard:
    """
    The process in which this was made; as a context: the task's code, called in that process.

    Whoever leaves the context in a fork of that process ends there, also with an exception.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()

    def exit_if_forked(self) -> None:
        """End the calling process at once if it is another one: exit status 1, and a message."""
        here = os.getpid()
        if here != self._pid:
            # Neither logging nor print: another thread may have held their locks in the fork.
            os.write(2, (_MESSAGE % (here, self._pid, self._pid)).encode())
            os._exit(1)

    def __enter__(self) -> None:
        self.exit_if_forked()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.exit_if_forked()
