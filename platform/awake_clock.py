"""
A clock for deadlines that counts only while this process runs.

After a process was stopped (SIGSTOP, Ctrl-Z, a suspended laptop) or starved of CPU time, all its
deadlines have passed. Other processes may have been stopped as well, or their answers may be
waiting to be read, so that time must not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Condition

MAX_GAP_S = 1.0
"""Most seconds counted between two readings; waiting code reads the clock far more often."""
_POLL_S = 0.5


class AwakeClock:
    """Seconds since creation, at most `MAX_GAP_S` per gap between readings; single-threaded."""

    def __init__(self) -> None:
        self._now, self._read = 0.0, time.monotonic()

    def now(self) -> float:
        """Read the clock."""
        read = time.monotonic()
        self._now += min(read - self._read, MAX_GAP_S)
        self._read = read
        return self._now


def wait_awake(condition: Condition, predicate: Callable[[], bool], limit_s: float) -> bool:
    """
    Wait on a condition whose lock is held, like its `wait_for`, with a deadline on an `AwakeClock`.

    Args:
        condition: the condition.
        predicate: the predicate.
        limit_s: the deadline.

    Returns:
        The last value of `predicate`.
    """
    if predicate():
        return True
    clock = AwakeClock()
    while not condition.wait_for(predicate, min(_POLL_S, remaining_s := limit_s - clock.now())):
        if remaining_s <= _POLL_S and clock.now() >= limit_s:
            return predicate()
    return True
