"""One process of a script that is run as it is, and what it prints."""

from __future__ import annotations

import ctypes
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
from typing import IO

from distplat.platform.torchrun import ProcessLocation

_MOST_LINES = 10_000
"""Lines that are kept for the driver; beyond them the script waits in its `print`."""
_LINE_BYTES = 1 << 16
_REST_S = 1.0
"""How long output is waited for once the script has ended: a child may keep the pipe open."""
_PYTHONS = ("python", "python3")


@dataclass(frozen=True)
class ProcessOutput:
    """What a process has printed since the driver last took it."""

    lines: tuple[str, ...]
    exit_code: int | None
    """None: it runs. A negative one is that of a signal."""


class ScriptProcess:
    """
    Runs a command in a process of its own, which ends with this one.

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
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def location(self) -> ProcessLocation:
        """Say where the process would run."""
        return self._where()

    def port(self) -> int:
        """Find a port that is free now."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port: int = listener.getsockname()[1]
            return port

    def start(self, command: Sequence[str], environment: dict[str, str], folder: str | None) -> str:
        """
        Start the command; once.

        Args:
            command: with its arguments. `python` is the Python of this process, and a `*.py` is
                run by it.
            environment: beside the variables of this process.
            folder: where to; None: the one of this process.

        Returns:
            Why it cannot be started; empty: it runs.
        """
        with self._starting:
            if self._thread is None:
                begun = threading.Event()
                given = with_python(command), {**os.environ, **environment}, folder, begun
                self._thread = threading.Thread(target=self._run, args=given, daemon=True)
                self._thread.start()
                begun.wait()
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
        """Ask the process, and those that it has started, to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End them at once."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """End with everything that was started."""
        self.kill()

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _run(
        self,
        command: list[str],
        environment: dict[str, str],
        folder: str | None,
        begun: threading.Event,
    ) -> None:
        """Start the process and wait for it: it ends with the thread that has started it."""
        try:
            self._process = subprocess.Popen(  # the user's own command
                command,
                env={"PYTHONUNBUFFERED": "1", **environment},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                preexec_fn=_end_with_parent,  # it calls the kernel only
            )
        except Exception as error:  # also what Python itself refuses, such as a NUL character
            self._error = str(error) or repr(error)
            return
        finally:
            begun.set()
        assert self._process.stdout is not None, "it is a pipe"
        reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        reader.start()
        code = self._process.wait()
        reader.join(_REST_S)
        with self._changed:
            self._exit_code = code
            self._changed.notify_all()

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


_PR_SET_PDEATHSIG = 1  # prctl(2)


def _end_with_parent() -> None:
    """Have the kernel kill this process when the thread ends that has started it; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
