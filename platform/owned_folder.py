"""
Temporary directories of a process, removed by the next process if their owner was killed.

    /tmp/ray-k2h8x0aa/
        .distplat-owner     id of this boot; locked while the owner lives
        ...                 the owner's files

A process removes its directory when it ends; a killed process leaves it. A lock is released with
its process. Neither the age of a directory nor a process id would show reliably whether the owner
still lives.
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
    Create a directory that only this user can enter.

    Args:
        base: parent directory.
        prefix: of its name.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, base: Path, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        # The file is locked before it gets its final name.
        new = self.path / f"{_LOCK}.new"
        self._lock: IO[bytes] | None = None
        with suppress(OSError):  # a full disk, or one without locks: an orphan stays
            self._lock = new.open("xb", buffering=0)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.write(_boot_id())
            new.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove the directory tree; files that cannot be removed stay for the next process."""
        _remove(self.path)
        self.release()

    def release(self) -> None:
        """Release the lock, so that the next process removes the directory."""
        if self._lock is not None:
            self._lock.close()


def remove_orphans(base: Path, prefix: str) -> None:
    """
    Remove this user's directories whose owners were killed since this machine booted.

    Args:
        base: parent directory; may be writable by other users.
        prefix: of their names.
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
        if file is not None and file.read(300) == _boot_id() and _lock_if_free(file):
            _remove(folder)


def _boot_id() -> bytes:
    """Return an id of this boot: on a shared disk, only the locking machine knows a lock."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return socket.gethostname().encode()


def _lock_if_free(file: IO[bytes]) -> bool:
    """Take the lock of an ended process; False: its owner lives, or another process removes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove a directory, the lock file last, so that a partly removed one is found again."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink(missing_ok=True)
        if {path.name for path in folder.iterdir()} <= {_LOCK}:
            shutil.rmtree(folder, ignore_errors=True)
