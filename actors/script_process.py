"""Actor that runs one process of an unchanged script, and buffers its output."""

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

_MAX_LINES = 10_000
"""Lines buffered for the driver; if the buffer is full, `print` of the script blocks."""
_LINE_BYTES = 1 << 16
_DRAIN_S = 1.0
"""Timeout for output after the script has ended, because a child may keep the pipe open."""
_PYTHONS = ("python", "python3")
_DEFAULTS = {"PYTHONUNBUFFERED": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
"""Defaults of environment variables that the node does not set; the second as in torchrun."""
_WATCHER = str(Path(__file__).with_name("script_watcher.py"))
"""Starts the command; run with `-I -S`, so that it imports only the standard library."""


@dataclass(frozen=True)
class ProcessOutput:
    """Lines that the driver has not received yet, and the exit code."""

    lines: tuple[str, ...]
    exit_code: int | None
    """None: running. Negative: number of the signal that ended it."""


class ScriptProcess:
    """
    Runs a command in a child process; it and all its descendants end with this process.

    Args:
        locate: returns the location of this process.
    """

    def __init__(self, locate: Callable[[], ProcessLocation]) -> None:
        self._locate = locate
        self._start_lock = threading.Lock()
        self._changed = threading.Condition()
        self._lines: deque[str] = deque()
        self._received = 0  #: number of lines that the driver has received
        self._exit_code: int | None = None
        self._error = ""
        self._control: socket.socket | None = None  #: to the watcher, see `script_watcher.py`
        self._thread: threading.Thread | None = None

    def location(self) -> ProcessLocation:
        """Return the location of the process."""
        return self._locate()

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
        Start the command; repeated calls have no effect.

        Args:
            command: command and arguments. `python`, and a file `*.py`, use this process's Python.
            environment: variables in addition to those of this process.
            folder: working directory; None: that of this process.
            limit_s: timeout of the start.

        Returns:
            Why the command cannot be started; empty: it runs.
        """
        with self._start_lock:
            if self._thread is None:
                started = threading.Event()
                args = with_python(command), {**os.environ, **environment}, folder, started
                self._thread = threading.Thread(target=self._run, args=args, daemon=True)
                self._thread.start()
                if not started.wait(limit_s):
                    self._error = (
                        f"it did not start within {limit_s:g} s; `--start-timeout` changes "
                        "this deadline"
                    )
                    self.kill()
        return self._error

    def output(self, received: int, wait_s: float) -> ProcessOutput:
        """
        Return the buffered lines.

        Args:
            received: number of lines that the driver has received, which the buffer drops.
            wait_s: seconds to wait for a line or the exit code.
        """
        with self._changed:
            while self._received < received:
                self._lines.popleft()
                self._received += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._lines or self._exit_code is not None, wait_s)
            return ProcessOutput(tuple(self._lines), self._exit_code)

    def terminate(self) -> None:
        """Send SIGTERM to the command's process group."""
        if self._control is not None:
            with suppress(OSError):  # all processes have ended
                self._control.sendall(bytes([signal.SIGTERM]))

    def kill(self) -> None:
        """Kill the command and all its descendants."""
        if self._control is not None:
            with suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `kill`; if this process is killed, the kernel closes the socket instead."""
        self.kill()

    def _run(
        self,
        command: list[str],
        environment: dict[str, str],
        folder: str | None,
        started: threading.Event,
    ) -> None:
        """
        Start the process and wait for its end.

        A running script has no deadline. If the actor ends, the watcher kills the script.
        """
        try:
            watcher, status = self._start_watcher(command, environment, folder)
        except Exception as error:  # also ValueError, for example for a NUL character
            self._error = self._error or str(error) or repr(error)
            return
        finally:
            started.set()
        reader = threading.Thread(target=self._read, args=(watcher.stdout,), daemon=True)
        reader.start()
        code = ""
        with suppress(OSError):  # the watcher was killed before it read a signal's number
            code = status.readline()
        reader.join(_DRAIN_S)
        with self._changed:  # no code: the watcher was killed, and the kernel killed the command
            self._exit_code = int(code) if code else -signal.SIGKILL
            self._changed.notify_all()
        watcher.wait()

    def _start_watcher(
        self, command: list[str], environment: dict[str, str], folder: str | None
    ) -> tuple[subprocess.Popen[str], TextIO]:
        """
        Start the watcher and wait until it has started the command; `start` has the deadline.

        Returns:
            The watcher's process, whose stdout is the command's output, and its status messages.

        Raises:
            OSError: the command cannot be started.
        """
        self._control, watcher_end = socket.socketpair()
        status = self._control.makefile("r", encoding="utf-8", errors="replace")
        with watcher_end:
            watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", _WATCHER, *command],
                env={**_DEFAULTS, **environment},
                cwd=folder,
                stdin=watcher_end.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        assert watcher.stdout is not None, "stdout is a pipe"
        error = status.readline()
        if error != "\n":
            raise OSError(error.strip() or watcher.stdout.read().strip())
        return watcher, status

    def _read(self, stream: IO[str]) -> None:
        while line := stream.readline(_LINE_BYTES):
            with self._changed:
                self._changed.wait_for(lambda: len(self._lines) < _MAX_LINES)
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()


def with_python(command: Sequence[str]) -> list[str]:
    """Run `python` and `*.py` with this interpreter: a node's PATH may start with another one."""
    program, *arguments = command
    if program in _PYTHONS:
        return [sys.executable, *arguments]
    if Path(program).suffix == ".py":
        return [sys.executable, *command]
    return list(command)
