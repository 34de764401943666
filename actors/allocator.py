"""
What a worker's allocator does with memory that a step has freed: keep it for the next step.

    step      allocates activations       frees them        allocates as much again
    glibc     asks the kernel for pages   gives them back   asks again, and all are zeroed again
    here      asks the kernel for pages   keeps them        takes them

A conv net of 24 k parameters had 6,000 to 20,000 page faults in every step, a fifth of its time
(docs/decisions/kept_memory.md).
"""

import ctypes
import os

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
