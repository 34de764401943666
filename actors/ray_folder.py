"""
The directory with the files of a Ray of our own: who removes it, and what of it is kept.

    /tmp/ray-k2h8x0aa/          for this user alone
        .distplat-driver        names this kernel; locked as long as the driver lives
        r/session_.../          Ray's own: sockets, logs, spilled objects

Ray makes its directories, sockets and logs too, for everybody to write: whoever may put another
socket there can have workers run code. Hence a directory around them that nobody else enters.

A driver removes its directory when it ends. One that is killed leaves it, and the next run removes
it: a lock ends with the process that held it, which neither the age of a directory nor a number of
a process tells for certain.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from distplat.platform.disk import open_regular
from distplat.platform.errors import StorageError

_PREFIX, _LOCK = "ray-", ".distplat-driver"
_MOST_FILES, _MOST_BYTES = 64, 16 * 2**10
"""So many logs are kept, and so many bytes at the end of each: a megabyte in all."""
_FIRST = ("raylet.", "gcs_server.")
"""The logs that tell why a cluster failed come before the others."""


class RayFolder:
    """
    Makes a directory for a Ray that starts.

    Args:
        base: where.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, base: Path) -> None:
        base.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self.path = self._folder / "r"  #: for Ray, which makes it
        # Under its name the file is locked from its first moment.
        new = self._folder / f"{_LOCK}.new"
        self._lock: IO[bytes] | None = None
        with suppress(OSError):  # a full disk, or one without locks: what is left there stays
            self._lock = new.open("xb", buffering=0)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.write(_kernel())
            new.rename(self._folder / _LOCK)

    def remove(self) -> None:
        """Remove it with all in it; what cannot be removed stays for the next run."""
        _remove(self._folder)
        self._unlock()

    def close(self) -> None:
        """Leave what Ray has written to whoever wants to know why it did not start."""
        if not self.path.exists():
            self.remove()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def ends_of_logs(self, hidden: str) -> bytes:
        """
        Give the last lines of Ray's logs, one log below the other; empty: there are none.

        What workers printed is not among them: it is in the run directory.

        Args:
            hidden: a text that is left out: Ray's token.
        """
        logs = [
            path
            for path in self.path.glob("session_2*/logs/*")
            if path.is_file() and not path.name.startswith("worker-")
        ]
        logs.sort(key=lambda path: (not path.name.startswith(_FIRST), -path.stat().st_mtime))
        text = "".join(_ends(logs[:_MOST_FILES]))
        return (text.replace(hidden, "***") if hidden else text).encode()


def _ends(logs: list[Path]) -> Iterator[str]:
    for path in logs:
        with suppress(StorageError), open_regular(path) as file:
            if file is None or not (size := os.fstat(file.fileno()).st_size):
                continue
            file.seek(max(0, size - _MOST_BYTES))
            text = file.read(_MOST_BYTES).decode(errors="replace").rstrip()
            yield f"==> {path.name} <==\n{text}\n\n"


def remove_left(base: Path) -> None:
    """
    Remove the directories of drivers that were killed since this machine started: this user's own.

    Args:
        base: where they lie; other users may write there.
    """
    with suppress(OSError):
        for entry in list(os.scandir(base)):
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError, StorageError):
                    _remove_if_left(Path(entry.path))


def _remove_if_left(folder: Path) -> None:
    about = folder.lstat()
    if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
        return
    with open_regular(folder / _LOCK) as file:
        if file is not None and file.read(300) == _kernel() and _is_free(file):
            _remove(folder)


def _kernel() -> bytes:
    """Name what knows a lock: where machines share a disk it may be one of them alone."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return socket.gethostname().encode()


def _is_free(file: IO[bytes]) -> bool:
    """Take the lock of a driver that is no more; False: it lives, or another run removes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove a directory, the lock last: what could not be removed is found again by it."""
    shutil.rmtree(folder / "r", ignore_errors=True)
    if not (folder / "r").exists():
        shutil.rmtree(folder, ignore_errors=True)
