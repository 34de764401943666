"""
Ends forks of the training process that return from the task's code.

A child that a task forks shares the training process's memory and connections. If it returned from
the task's code, it would continue training as the same rank, through the same shared memory and
sockets. So such a child exits.
"""

from __future__ import annotations

import os
from types import TracebackType

_MESSAGE = (
    "E process %d, which the task forked from the training process %d, has left the task's code, "
    "and ends here: training continues in process %d alone. End such a process with os._exit() in "
    "the task\n"
)


class ForkGuard:
    """
    Context manager around the task's code: a fork of this process that leaves it exits.

    The fork exits also when it leaves the block with an exception.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()

    def exit_if_forked(self) -> None:
        """Exit with status 1 and a message if the calling process is a fork."""
        here = os.getpid()
        if here != self._pid:
            # No logging or print: another thread may have held their locks at the fork.
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
