"""
Wait for, and post, 32-bit words in shared memory: Linux futexes, between processes.

A post adds one to a word and wakes who sleeps on it; a wait sleeps until the word has reached a
number. Words only grow, and wrap at 2^32, so two of them are compared by their distance.

Python has no atomic stores, so the kernel orders memory for us. A post is one `FUTEX_WAKE_OP`: the
kernel adds to the word atomically, after all that this thread wrote before (release). A wait that
found its number makes one more `FUTEX_WAIT`, which returns at once but is a full barrier, so what
is read after it is what was written before the post (acquire). On x86-64 loads are never reordered
with loads, and that call is left out.
"""

import ctypes
import os
import select
import sys

_WAIT, _WAKE, _WAKE_OP = 0, 1, 5
_EVERYBODY = 2**31 - 1
_ADD_ONE = 1 << 28 | 1 << 12
"""Operation of `FUTEX_WAKE_OP`: add 1; its comparison concerns a second word, which nobody uses."""
_MACHINE = os.uname().machine
_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
LOADS_IN_ORDER = _MACHINE == "x86_64"
_NUMBER = _NUMBERS.get(_MACHINE, 0)


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# CDLL, not PyDLL: other threads of this process run while one sleeps.
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
    """Whether this machine has futexes that we know how to call."""
    return sys.platform == "linux" and _NUMBER > 0 and ctypes.sizeof(ctypes.c_void_p) == 8


def reached(value: int, target: int) -> bool:
    """Whether a word that shows `value` has come to `target`; they lie within 2^31."""
    return (value - target) & 0xFFFFFFFF < 0x80000000


class Word:
    """
    A 32-bit number in shared memory.

    Args:
        memory: the shared memory, kept alive by this word.
        offset: where the word lies, bytes; a multiple of 4.
    """

    __slots__ = ("_address", "_cell", "_memory")

    def __init__(self, memory: memoryview, offset: int) -> None:
        self._memory = memory
        self._cell = memory[offset : offset + 4].cast("I")
        self._address = ctypes.addressof(ctypes.c_uint32.from_buffer(memory, offset))

    @property
    def value(self) -> int:
        """What the word shows now, 0 <= value < 2^32."""
        return self._cell[0]

    def post(self) -> None:
        """Add one, visible after all that this thread has written, and wake all waiters."""
        address = self._address
        # val 2^31-1 wakes all on the first address; the second number of sleepers to wake is 0.
        if _syscall(_NUMBER, address, _WAKE_OP, _EVERYBODY, None, address, _ADD_ONE) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def wake(self) -> None:
        """Wake all waiters without a change: they check and sleep on."""
        _syscall(_NUMBER, self._address, _WAKE, _EVERYBODY, None, None, 0)

    def wait(self, target: int, slice_s: float) -> bool:
        """
        Sleep until the word has reached `target`, somebody wakes it, or `slice_s` seconds passed.

        Returns:
            Whether it has; who gets False looks after what else may have happened and comes again.
        """
        value = self._cell[0]
        if not reached(value, target):
            self._sleep(value, slice_s)
            if not reached(self._cell[0], target):
                return False
        if not LOADS_IN_ORDER:
            self._sleep(target - 1 & 0xFFFFFFFF, 0.0)  # the barrier; see above
        return True

    def _sleep(self, value: int, seconds: float) -> None:
        """Sleep while the word shows `value`; interrupted, woken or too late: all return alike."""
        whole = int(seconds)
        limit = _Time(whole, int((seconds - whole) * 1e9))
        _syscall(_NUMBER, self._address, _WAIT, value, ctypes.byref(limit), None, 0)


def has_ended(descriptor: int) -> bool:
    """
    Say whether a process has ended, whoever its parent is.

    Args:
        descriptor: as `os.pidfd_open` gives it; `select` would refuse one above 1023.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
