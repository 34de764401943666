"""
Checks that a file fits into memory before it is read.

A sparse file may be larger than its disk (`truncate -s 1T`). Reading it would make the kernel kill
the process without a message.
"""

import os
from contextlib import suppress
from pathlib import Path

from distplat.platform.disk import open_regular
from distplat.platform.errors import StorageError

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class DoesNotFit(StorageError):
    """A file is larger than all memory."""


def check_fits(path: Path, size: int) -> None:
    """
    Check that a file, or a directory of files, fits into all memory and swap.

    Free memory would be too strict: it excludes reclaimable caches, such as ZFS's.

    Args:
        path: for the error.
        size: bytes.

    Raises:
        DoesNotFit: it is larger than memory and swap.
    """
    total = memory_and_swap()
    if total is not None and size > total:
        message = f"cannot read {path}: it has {size} bytes, and memory and swap {total}"
        raise DoesNotFit(message)


def check_whole_file(path: Path) -> None:
    """
    Check that a library may read a foreign file; a missing file is left to the library.

    Raises:
        StorageError: it is not readable, is a link, a pipe or a device, or does not fit.
    """
    with open_regular(path) as file:
        size = 0 if file is None else os.fstat(file.fileno()).st_size
    check_fits(path, size)


def memory_and_swap(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """
    Return the total bytes of memory and swap available to a process; None: unknown.

    Args:
        meminfo: the machine's values.
        cgroup: the container's limits (version 2), which may be lower.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        memory, swap = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, LookupError):
        return None
    return _limited(memory, cgroup / "memory.max") + _limited(swap, cgroup / "memory.swap.max")


def _limited(size: int, path: Path) -> int:
    """Apply a container's limit; without a limit its file contains "max" or does not exist."""
    with suppress(OSError, ValueError):
        return min(size, int(path.read_text()))
    return size
