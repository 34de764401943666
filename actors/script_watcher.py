"""
Run a command for an actor, and kill it and all its descendants when the actor ends.

    actor ── starts ──▶ this file ── forks ──▶ watcher ── starts ──▶ command, in its own session
      ▲                                          ▲                      │
      └──── socket: signals ▶, ◀ exit code ──────┘ ◀── its orphans ─────┘

Executed by path, with only the standard library: `script_watcher.py COMMAND...`. stdin is the
socket:

- The watcher first writes a line: the error if the command cannot be started, else an empty line.
  After the command has ended, it writes the exit code; a negative one is the number of a signal.
- Each byte from the actor is the number of a signal for the command's process group. At EOF all
  processes are killed, because the actor has closed the socket or was killed.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_TICK_S, _TICKS = 0.05, 1200
"""Polling interval after SIGKILL, and its count: processes have a minute to end."""


def main(command: list[str]) -> None:
    """Run the command, and wait until it and all its descendants have ended."""
    if watcher := os.fork():  # Ray kills children of a killed actor, but not grandchildren
        os.closerange(0, 3)
        os.waitpid(watcher, 0)
        return
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signals = _signals()
    try:
        script = subprocess.Popen(  # the user's command
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # a system call only
        )
    except Exception as error:  # also ValueError, for example for a NUL character
        _send(str(error) or repr(error))
        return
    _send("")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):  # only the command keeps the output open
        os.dup2(null, descriptor)
    while _reap(script) and _forward_signal(script, signals):
        pass
    _signal_group(script, signal.SIGKILL)
    for _ in range(_TICKS):  # orphans of killed processes become children of this process
        if not _reap(script):
            return
        for child in _children():
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        time.sleep(_TICK_S)


def _signals() -> int:
    """
    Install signal handlers; return a pipe that becomes readable after each signal.

    The handlers do nothing, because a handler may be interrupted by the next signal. The command
    does not inherit them: `exec` resets handlers, but keeps ignored signals.
    """
    read_end, write_end = os.pipe()
    for descriptor in (read_end, write_end):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
    ):  # batch systems signal all processes
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    return read_end


def _reap(script: subprocess.Popen[bytes]) -> bool:
    """Reap ended children, and send the command's exit code; return whether children remain."""
    with suppress(ChildProcessError):
        while (result := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = result
            if pid == script.pid:
                script.returncode = os.waitstatus_to_exitcode(status)
                _send(str(script.returncode))
        return True
    return False


def _forward_signal(script: subprocess.Popen[bytes], signals: int) -> bool:
    """
    Wait until a child may have ended or the actor sends a signal, and forward the signal.

    There is no deadline, because the duration of a script is unlimited.

    Returns:
        Whether the actor is still connected.
    """
    ready, _, _ = select.select([0, signals], [], [])
    if signals in ready:
        os.read(signals, 1 << 16)
    if 0 in ready:
        message = b""
        with suppress(OSError):  # the actor has ended without reading the exit code
            message = os.read(0, 1)
        if not message:
            return False
        _signal_group(script, message[0])
    return True


def _signal_group(script: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the command's group, unless it has ended and its pid may be reused."""
    if script.returncode is None:
        with suppress(OSError):
            os.killpg(script.pid, number)


def _children() -> Iterator[int]:
    """Yield the pids of this process's children, from /proc."""
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with suppress(OSError, ValueError), open(f"/proc/{int(name)}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                yield int(name)


def _send(line: str) -> None:
    with suppress(OSError):  # the actor has ended
        os.write(0, f"{line}\n".encode(errors="replace"))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    main(sys.argv[1:])
