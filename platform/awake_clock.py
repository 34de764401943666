"""
A clock for deadlines, which counts only while this process is at work.

A process that was stopped (SIGSTOP, Ctrl-Z, a laptop that sleeps) or had no share of the processor
comes back to find that all deadlines are over. The others may have been stopped as well, or their
answers wait to be read: that time must not count against them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Condition

MAX_GAP_S = 1.0
"""As long as this, at most, counts between two readings; who waits looks round far more often."""
_LOOK_S = 0.5


class AwakeClock:
    """Seconds since it was made, at most `MAX_GAP_S` of a gap between readings; for one thread."""

    def __init__(self) -> None:
        self._now, self._read = 0.0, time.monotonic()

    def now(self) -> float:
        """Read the clock; goes on by no more than `MAX_GAP_S` since the last time."""
        read = time.monotonic()
        self._now += min(read - self._read, MAX_GAP_S)
        self._read = read
        return self._now


def wait_awake(changed: Condition, over: Callable[[], bool], limit_s: float) -> bool:
    """
    Wait on a condition that is held, as its `wait_for` does, with a deadline of this kind.

    Args:
        changed: the condition.
        over: what is waited for.
        limit_s: for so long at most.

    Returns:
        What `over` said last.
    """
    if over():
        return True
    clock = AwakeClock()
    while not changed.wait_for(over, min(_LOOK_S, left := limit_s - clock.now())):
        if left <= _LOOK_S and clock.now() >= limit_s:
            return over()
    return True
