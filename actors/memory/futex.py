"""
Wait and post on 32-bit words in shared memory: Linux futexes between processes.

A post increments a word and wakes the threads that sleep on it. A wait sleeps until the word has
reached a target. Words only increase and wrap at 2^32, so they are compared by their distance.

Python has no atomic stores, so the kernel provides the memory ordering. A post is a
`FUTEX_WAKE_OP`: the kernel increments the word atomically, after all earlier writes of this thread
(release). A wait that finds its target calls `FUTEX_WAIT` once more. That call returns immediately,
but it is a full barrier, so later reads see all writes before the post (acquire). x86-64 never
reorders loads with loads, so the additional call is omitted there.
"""

import ctypes
import os
import select
import sys

_WAIT, _WAKE, _WAKE_OP = 0, 1, 5
_ALL_WAITERS = 2**31 - 1
_ADD_ONE = 1 << 28 | 1 << 12
"""Operation of `FUTEX_WAKE_OP`: add 1. Its comparison concerns a second word, which is not used."""
_MACHINE = os.uname().machine
_SYSCALL_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
LOADS_IN_ORDER = _MACHINE == "x86_64"
_SYSCALL_NUMBER = _SYSCALL_NUMBERS.get(_MACHINE, 0)


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# CDLL, not PyDLL: it releases the GIL, so other threads run while one sleeps.
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint32,
)


def supported() -> bool:
    """Return whether futexes are available on this platform and their syscall number is known."""
    return sys.platform == "linux" and _SYSCALL_NUMBER > 0 and ctypes.sizeof(ctypes.c_void_p) == 8


def reached(value: int, target: int) -> bool:
    """Return whether a word with `value` has reached `target`; the two must lie within 2^31."""
    return (value - target) & 0xFFFFFFFF < 0x80000000


class Word:
    """
    A 32-bit counter in shared memory.

    Args:
        memory: the shared memory; this object keeps it alive.
        offset: position of the word in bytes; a multiple of 4.
    """

    __slots__ = ("_address", "_cell", "_memory")

    def __init__(self, memory: memoryview, offset: int) -> None:
        self._memory = memory
        self._cell = memory[offset : offset + 4].cast("I")
        self._address = ctypes.addressof(ctypes.c_uint32.from_buffer(memory, offset))

    @property
    def value(self) -> int:
        """Current value, 0 <= value < 2^32."""
        return self._cell[0]

    def post(self) -> None:
        """Increment the word after all earlier writes of this thread, and wake all waiters."""
        address = self._address
        # Wake up to 2^31-1 waiters of the first address, and none of the second address.
        if _syscall(_SYSCALL_NUMBER, address, _WAKE_OP, _ALL_WAITERS, None, address, _ADD_ONE) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def wake(self) -> None:
        """Wake all waiters without changing the word: they check it and sleep again."""
        _syscall(_SYSCALL_NUMBER, self._address, _WAKE, _ALL_WAITERS, None, None, 0)

    def wait(self, target: int, slice_s: float) -> bool:
        """
        Sleep until the word reaches `target`, another thread wakes this one, or `slice_s` seconds
        pass.

        Returns:
            Whether the word has reached `target`. After False, check other conditions and call
            again.
        """
        value = self._cell[0]
        if not reached(value, target):
            self._sleep(value, slice_s)
            if not reached(self._cell[0], target):
                return False
        if not LOADS_IN_ORDER:
            self._sleep(target - 1 & 0xFFFFFFFF, 0.0)  # full barrier; see the module's docstring
        return True

    def _sleep(self, value: int, seconds: float) -> None:
        """Sleep while the word has `value`; returns after interrupts, wake-ups and timeouts."""
        whole_s = int(seconds)
        limit = _Time(whole_s, int((seconds - whole_s) * 1e9))
        _syscall(_SYSCALL_NUMBER, self._address, _WAIT, value, ctypes.byref(limit), None, 0)


def has_ended(descriptor: int) -> bool:
    """
    Return whether a process has ended; it need not be a child process.

    Args:
        descriptor: from `os.pidfd_open`. Polled, because `select` rejects descriptors above 1023.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
