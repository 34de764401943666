"""Python code in processes that are forked from a server, which has imported torch already."""

import os
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection

TIMEOUT_S = 60.0


class ForkedPython:
    """
    A process that runs code like `python -c`, with pipes as stdin and stdout, and starts in 0.1 s.

    The fixture `loader_server` starts the server.
    """

    def __init__(self, code: str, *arguments: str) -> None:
        context = get_context("forkserver")
        stdin, writer = context.Pipe(duplex=False)
        reader, stdout = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_run, args=(code, arguments, stdin, stdout), daemon=True
        )
        self._process.start()
        self.stdin = os.fdopen(os.dup(writer.fileno()), "w")
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        for connection in (stdin, stdout, reader, writer):
            connection.close()

    @property
    def pid(self) -> int:
        """The process's identifier."""
        assert self._process.pid is not None
        return self._process.pid

    def end(self) -> None:
        """Kill the process, wait until it has ended, and close the pipes."""
        self.kill()
        self.wait()
        self.stdin.close()
        self.stdout.close()

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.join(TIMEOUT_S)
        assert not self.is_alive()

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.is_alive()

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()


def _run(code: str, arguments: tuple[str, ...], stdin: "Connection", stdout: "Connection") -> None:
    sys.argv = ["-c", *arguments]
    sys.stdin = os.fdopen(os.dup(stdin.fileno()))
    sys.stdout = os.fdopen(os.dup(stdout.fileno()), "w")
    exec(code, {"__name__": "__main__"})
    sys.stdout.flush()
