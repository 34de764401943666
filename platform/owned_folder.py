"""
Directories that a process makes for itself, and that the next one removes if it was killed.

    /tmp/ray-k2h8x0aa/
        .distplat-owner     names this kernel; locked as long as the owner lives
        ...                 the owner's files

A process removes its directory when it ends. One that is killed leaves it. A lock ends with the
process that held it, which neither the age of a directory nor a number of a process tells for
certain.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from distplat.platform.disk import open_regular
from distplat.platform.errors import StorageError

_LOCK = ".distplat-owner"


class OwnedFolder:
    """
    Makes a directory that only this user can enter.

    Args:
        base: where.
        prefix: its name begins so.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, base: Path, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        # Under its name the file is locked from its first moment.
        new = self.path / f"{_LOCK}.new"
        self._lock: IO[bytes] | None = None
        with suppress(OSError):  # a full disk, or one without locks: what is left there stays
            self._lock = new.open("xb", buffering=0)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.write(_kernel())
            new.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove it with all in it; what cannot be removed stays for the next process."""
        _remove(self.path)
        self.leave()

    def leave(self) -> None:
        """Let the next process remove it."""
        if self._lock is not None:
            self._lock.close()


def remove_orphans(base: Path, prefix: str) -> None:
    """
    Remove what was left by processes that were killed since this machine started: this user's own.

    Args:
        base: where it lies; other users may write there.
        prefix: its names begin so.
    """
    with suppress(OSError):
        for entry in list(os.scandir(base)):
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError, StorageError):
                    _remove_if_left(Path(entry.path))


def _remove_if_left(folder: Path) -> None:
    stat_result = folder.lstat()
    if stat_result.st_uid != os.geteuid() or stat.S_IMODE(stat_result.st_mode) & 0o077:
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
    """Take the lock of a process that is no more; False: it lives, or another one removes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove a directory, the lock last: what could not be removed is found again by it."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink(missing_ok=True)
        if {path.name for path in folder.iterdir()} <= {_LOCK}:
            shutil.rmtree(folder, ignore_errors=True)
