"""One process of a script that is run as it is, and what it prints."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

from distplat.platform.torchrun import ProcessLocation, free_port

_MOST_LINES = 10_000
"""Lines that are kept for the driver; beyond them the script waits in its `print`."""
_LINE_BYTES = 1 << 16
_REST_S = 1.0
"""How long output is waited for once the script has ended: a child may keep the pipe open."""
_PYTHONS = ("python", "python3")
_BY_DEFAULT = {"PYTHONUNBUFFERED": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
"""Variables that a script gets where the node does not set them; the second as from torchrun."""
_WATCHER = str(Path(__file__).with_name("script_watcher.py"))
"""What starts the command; `-I -S`: it imports nothing of the user's or of what is installed."""


@dataclass(frozen=True)
class ProcessOutput:
    """What a process has printed since the driver last took it."""

    lines: tuple[str, ...]
    exit_code: int | None
    """None: it runs. A negative one is that of a signal."""


class ScriptProcess:
    """
    Runs a command in a process of its own, which ends with this one, as does all that it starts.

    Args:
        where: says where this object is.
    """

    def __init__(self, where: Callable[[], ProcessLocation]) -> None:
        self._where = where
        self._starting = threading.Lock()
        self._changed = threading.Condition()
        self._lines: deque[str] = deque()
        self._taken = 0  #: lines that the driver has
        self._exit_code: int | None = None
        self._error = ""
        self._control: socket.socket | None = None  #: to the watcher, see `script_watcher.py`
        self._thread: threading.Thread | None = None

    def location(self) -> ProcessLocation:
        """Say where the process would run."""
        return self._where()

    def port(self) -> int:
        """See `free_port`."""
        return free_port()

    def start(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        folder: str | None,
        limit_s: float,
    ) -> str:
        """
        Start the command; once.

        Args:
            command: with its arguments. `python` is the Python of this process, and a `*.py` is
                run by it.
            environment: beside the variables of this process.
            folder: where to; None: the one of this process.
            limit_s: how long its beginning may take.

        Returns:
            Why it cannot be started; empty: it runs.
        """
        with self._starting:
            if self._thread is None:
                begun = threading.Event()
                given = with_python(command), {**os.environ, **environment}, folder, begun
                self._thread = threading.Thread(target=self._run, args=given, daemon=True)
                self._thread.start()
                if not begun.wait(limit_s):
                    self._error = (
                        f"it has not begun within {limit_s:g} s; `--start-timeout` changes "
                        "this deadline"
                    )
                    self.kill()
        return self._error

    def output(self, taken: int, wait_s: float) -> ProcessOutput:
        """
        Give lines that were printed.

        Args:
            taken: lines that the driver has had; they are forgotten, the others given again.
            wait_s: how long to wait for a line or the end.
        """
        with self._changed:
            while self._taken < taken:
                self._lines.popleft()
                self._taken += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._lines or self._exit_code is not None, wait_s)
            return ProcessOutput(tuple(self._lines), self._exit_code)

    def terminate(self) -> None:
        """Ask the process, and those of its group, to end."""
        if self._control is not None:
            with suppress(OSError):  # all have ended
                self._control.sendall(bytes([signal.SIGTERM]))

    def kill(self) -> None:
        """End at once everything that was started."""
        if self._control is not None:
            with suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `kill`; where this process ends without that, the kernel closes the socket."""
        self.kill()

    def _run(
        self,
        command: list[str],
        environment: dict[str, str],
        folder: str | None,
        begun: threading.Event,
    ) -> None:
        """
        Start the process and wait for it.

        Once it has begun there is no deadline: a script, and what it leaves running, take their
        time. The end of the actor ends both, and the watcher.
        """
        try:
            watcher, told = self._begin(command, environment, folder)
        except Exception as error:  # also what Python itself refuses, such as a NUL character
            self._error = self._error or str(error) or repr(error)
            return
        finally:
            begun.set()
        reader = threading.Thread(target=self._read, args=(watcher.stdout,), daemon=True)
        reader.start()
        code = ""
        with suppress(OSError):  # the watcher was killed before it has read a signal's number
            code = told.readline()
        reader.join(_REST_S)
        with self._changed:  # the kernel kills a command whose watcher was killed
            self._exit_code = int(code) if code else -signal.SIGKILL
            self._changed.notify_all()
        watcher.wait()

    def _begin(
        self, command: list[str], environment: dict[str, str], folder: str | None
    ) -> tuple[subprocess.Popen[str], TextIO]:
        """
        Start the watcher, and wait until it has started the command; `start` has the deadline.

        Returns:
            The watcher's process, whose output is the command's; what it tells of the command.

        Raises:
            OSError: the command cannot be started.
        """
        self._control, watcher_end = socket.socketpair()
        told = self._control.makefile("r", encoding="utf-8", errors="replace")
        with watcher_end:
            watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", _WATCHER, *command],
                env={**_BY_DEFAULT, **environment},
                cwd=folder,
                stdin=watcher_end.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        assert watcher.stdout is not None, "it is a pipe"
        first = told.readline()
        if first != "\n":
            raise OSError(first.strip() or watcher.stdout.read().strip())
        return watcher, told

    def _read(self, stream: IO[str]) -> None:
        while line := stream.readline(_LINE_BYTES):
            with self._changed:
                self._changed.wait_for(lambda: len(self._lines) < _MOST_LINES)
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()


def with_python(command: Sequence[str]) -> list[str]:
    """Name the interpreter: workers of a cluster need not have this one first in their PATH."""
    first, *rest = command
    if first in _PYTHONS:
        return [sys.executable, *rest]
    return [sys.executable, first, *rest] if Path(first).suffix == ".py" else [first, *rest]
