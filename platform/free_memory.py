"""
Whether a file fits into memory, before it is read whole.

A file may have a size and hold nothing: `truncate -s 1T` takes no room on a disk. Whoever reads it
is killed by the kernel, without a word.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from distplat.platform.disk import open_regular
from distplat.platform.errors import StorageError

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class DoesNotFit(StorageError):
    """It is larger than the memory that is free."""


def check_fits(path: Path, size: int) -> None:
    """
    See that a file, or a directory of files, can be read whole.

    Args:
        path: for the error.
        size: bytes.

    Raises:
        DoesNotFit: it is larger than what is free.
    """
    free = available_memory()
    if free is not None and size > free:
        raise DoesNotFit(f"cannot read {path}: it has {size} bytes, and memory has {free} free")


def check_whole_file(path: Path) -> None:
    """
    See that a library may read a file of somebody else's run; one that is missing is left to it.

    Raises:
        StorageError: it may not be read, is a link, a pipe or a device, or does not fit.
    """
    with open_regular(path) as file:
        size = 0 if file is None else os.fstat(file.fileno()).st_size
    check_fits(path, size)


def available_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """
    Give the bytes that can be taken without the kernel ending a process; None: nobody says.

    Args:
        meminfo: the kernel's figures of the machine.
        cgroup: those of the container (version 2), whose limit may leave less.
    """
    return min((*_free_here(meminfo), *_free_in_container(cgroup)), default=None)


def _free_here(meminfo: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, LookupError):
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        yield sum(int(lines[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree"))


def _free_in_container(cgroup: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, LookupError):  # without a limit it says "max"
        most, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        figures = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(figures["file"]) - int(figures["shmem"])  # goes when somebody needs the room
        yield max(0, most - used + cached)
