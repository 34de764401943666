"""
Start a command for an actor, and end it and all that it has started when the actor is gone.

    actor ── starts ──▶ this file ── forks ──▶ watcher ── starts ──▶ command, in its own session
      ▲                                          ▲                      │
      └──── socket: signals ▶, ◀ exit code ──────┘ ◀── its orphans ─────┘

Run by its path, with the standard library alone: `script_watcher.py COMMAND...`. stdin is the
socket:

- First the watcher writes a line: why the command cannot be started; empty: it runs. When the
  command has ended, a line with its exit code follows; a negative one is that of a signal.
- Each byte from the actor is the number of a signal for the command's process group. At the end of
  the socket all processes are killed: the actor has closed it, or was killed itself.
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
"""What does not end within a minute of SIGKILL is left to the kernel."""


def main(command: list[str]) -> None:
    """Start the command, and stay until it and all that it has started have ended."""
    if watcher := os.fork():  # Ray kills an actor's own children together with it: not the watcher
        os.closerange(0, 3)
        os.waitpid(watcher, 0)
        return
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signals = _signals()
    try:
        script = subprocess.Popen(  # the user's own command
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # calls the kernel only
        )
    except Exception as error:  # also what Python itself refuses
        _tell(str(error) or repr(error))
        return
    _tell("")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):  # the output ends with the command
        os.dup2(null, number)
    while _reap(script) and _hear(script, signals):
        pass
    _signal_group(script, signal.SIGKILL)
    for _ in range(_TICKS):  # children of the killed ones become children of this process
        if not _reap(script):
            return
        for child in _children():
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        time.sleep(_TICK_S)


def _signals() -> int:
    """
    Give a pipe that can be read from after each signal, none of which ends this process any more.

    The handlers do nothing: one that did could be interrupted by the next signal. The command has
    none of them. What it is to ignore stays ignored: `exec` keeps that, and gives up handlers.
    """
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # sent to all processes of a job
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    return reading


def _reap(script: subprocess.Popen[bytes]) -> bool:
    """Take the exit codes of children that have ended; say whether there are others."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == script.pid:
                script.returncode = os.waitstatus_to_exitcode(ended[1])
                _tell(str(script.returncode))
        return True
    return False


def _hear(script: subprocess.Popen[bytes], signals: int) -> bool:
    """
    Wait until a child may have ended, or the actor sends a signal, and pass it on.

    There is no deadline: a script runs as long as it runs.

    Returns:
        Whether the actor is there.
    """
    ready, _, _ = select.select([0, signals], [], [])
    if signals in ready:
        os.read(signals, 1 << 16)
    if 0 in ready:
        sent = b""
        with suppress(OSError):  # the actor has ended without reading the exit code
            sent = os.read(0, 1)
        if not sent:
            return False
        _signal_group(script, sent[0])
    return True


def _signal_group(script: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the command's group; once it has ended, its number may be another's."""
    if script.returncode is None:
        with suppress(OSError):
            os.killpg(script.pid, number)


def _children() -> Iterator[int]:
    """Give the children of this process, as Linux tells them."""
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with suppress(OSError, ValueError), open(f"/proc/{int(name)}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                yield int(name)


def _tell(line: str) -> None:
    with suppress(OSError):  # the actor is gone
        os.write(0, f"{line}\n".encode(errors="replace"))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    main(sys.argv[1:])
