"""
Setup of an actor's process: imports, logging, and memory allocator.

Memory that a step frees is kept for the next step:

    step             allocates activations   frees them           allocates the same size
    glibc default    maps pages              returns the pages    maps and zeroes pages again
    these settings   maps pages              keeps the pages      reuses the pages

A conv net of 24 k parameters had 6,000 to 20,000 page faults in every step, a fifth of its time
(docs/decisions/kept_memory.md).
"""

import ctypes
import gc
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """
    Disable the garbage collector during imports, and freeze the imported objects afterwards.

    Objects of an imported package live forever, and scanning them for garbage takes a tenth of
    torch's import. If torch is already imported nothing is changed, because existing garbage would
    be frozen as well.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def variables(values: Mapping[str, str], *also: str) -> Iterator[None]:
    """Set environment variables in a block; also restore those in `also` afterwards."""
    saved = {name: os.environ.get(name) for name in (*values, *also)}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def log_to_stderr() -> None:
    """
    Print log records of distplat from INFO up; loggers of other packages are unchanged.

    Also keep Ray from printing errors of calls whose result is not fetched: after a failure servers
    refuse calls of the previous attempt, and each would print a traceback.
    """
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    package_logger = logging.getLogger("distplat")
    if not package_logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
        package_logger.addHandler(handler)
        package_logger.setLevel(logging.INFO)
        package_logger.propagate = False


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_NEVER = 2**31 - 1
_LARGEST = 32 * 2**20
"""Largest threshold of glibc on 64-bit machines; larger blocks are still mapped and unmapped."""
_HEAP = 64 * 2**20
"""Heap size of threads other than the main one; with less padding empty heaps are unmapped."""
_SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_THRESHOLD_",
    "GLIBC_TUNABLES",
)


def keep_freed_memory() -> bool:
    """
    Make glibc keep freed memory; return whether it does.

    Nothing changes if environment variables configure the allocator, or with another C library.
    Preloaded allocators (jemalloc, tcmalloc) are not affected.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _SETTINGS):
        return False
    settings = ((_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, _LARGEST), (_M_TOP_PAD, _HEAP))
    return all([mallopt(option, value) == 1 for option, value in settings])
