"""
What a process of an actor sets when it starts: its imports, its log, its memory allocator.

Memory that a step has freed is kept for the next step:

    step      allocates activations       frees them        allocates as much again
    glibc     asks the kernel for pages   gives them back   asks again, and all are zeroed again
    here      asks the kernel for pages   keeps them        takes them

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
    Keep the garbage collector out of a block of imports.

    What a large package makes while it is imported stays for ever; looking through it again and
    again for garbage is a tenth of torch's import. Afterwards it is never looked at again. Where
    torch is there already nothing is done: what is garbage by then would stay for ever as well.
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
    """Set environment variables in a block; `also`: others that the block may set itself."""
    before = {name: os.environ.get(name) for name in (*values, *also)}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def log_to_stderr() -> None:
    """
    Show distplat's own records from INFO up in this process; other packages' are left alone.

    Ray is told not to print the errors of calls that nobody waits for any more: after a loss
    servers refuse those of the attempt before, as they should, and each would be a traceback.
    """
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    ours = logging.getLogger("distplat")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_NEVER = 2**31 - 1
_LARGEST = 32 * 2**20
"""glibc takes no larger threshold on 64-bit machines; larger blocks come and go as before."""
_HEAP = 64 * 2**20
"""Size of the heaps of all threads but the main one: with less padding empty ones are unmapped."""
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """
    Have glibc keep what this process frees; say whether it does.

    Whoever has set the allocator up by environment variables, or runs another C library, is left
    alone. Another allocator that was loaded before (jemalloc, tcmalloc) is not touched by it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _USERS):
        return False
    settings = ((_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, _LARGEST), (_M_TOP_PAD, _HEAP))
    return all([mallopt(option, value) == 1 for option, value in settings])
