"""
Whether a file fits into memory, before it is read whole.

A file may have a size and hold nothing: `truncate -s 1T` takes no room on a disk. Whoever reads it
is killed by the kernel, without a word.
"""

import os
from contextlib import suppress
from pathlib import Path

from distplat.platform.disk import open_regular
from distplat.platform.errors import StorageError

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class DoesNotFit(StorageError):
    """It is larger than all memory."""


def check_fits(path: Path, size: int) -> None:
    """
    See that a file, or a directory of files, can be read whole if nothing else takes memory.

    What is free at the moment would refuse too much: caches that the kernel gives back, such as
    ZFS's, are not in its figures.

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
    See that a library may read a file of somebody else's run; one that is missing is left to it.

    Raises:
        StorageError: it may not be read, is a link, a pipe or a device, or does not fit.
    """
    with open_regular(path) as file:
        size = 0 if file is None else os.fstat(file.fileno()).st_size
    check_fits(path, size)


def memory_and_swap(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """
    Give the bytes of memory and swap that a process may have at most; None: nobody says.

    Args:
        meminfo: the kernel's figures of the machine.
        cgroup: those of the container (version 2), which may be allowed less.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        memory, swap = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, LookupError):
        return None
    return _limited(memory, cgroup / "memory.max") + _limited(swap, cgroup / "memory.swap.max")


def _limited(size: int, path: Path) -> int:
    """Apply the limit of a container: without one its file says "max", or is not there."""
    with suppress(OSError, ValueError):
        return min(size, int(path.read_text()))
    return size
