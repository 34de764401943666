"""
Load metrics of shards: bytes, update time, and the queue of pushes.

    push arrives ──▶ |  queue: earlier pushes, or gradients that the step lacks  | apply |
                     ^ depth: pushes in the queue, including this one

Servers measure each push and return the metrics in the reply; workers count the bytes.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

MAX_SHOWN_SHARDS = 16
"""Most shards with metrics of their own in a line of metrics."""


@dataclass(frozen=True)
class ShardLoad:
    """Load of one push on one shard."""

    in_bytes: int = 0
    """Bytes of the gradient, as sent or in shared memory."""
    out_bytes: int = 0
    """Bytes of the returned parameters; 0 where the worker shares the server's memory."""
    apply_s: float = 0.0
    """Time for the sum and the update."""
    queue_s: float = 0.0
    """Time between the arrival of the push and the start of its update."""
    queue_depth: int = 0
    """Pushes in the queue when this push arrived, including this one."""


def load_figures(loads: Sequence[ShardLoad]) -> dict[str, float]:
    """
    Return the metrics of a step: of the slowest shard, of all shards together, and of each shard.

    Args:
        loads: by shard; empty: nothing was pushed.
    """
    if not loads:
        return {}
    figures = {
        "apply_s": max(load.apply_s for load in loads),
        "queue_s": max(load.queue_s for load in loads),
        "queue_depth": float(max(load.queue_depth for load in loads)),
        "in_bytes": float(sum(load.in_bytes for load in loads)),
        "out_bytes": float(sum(load.out_bytes for load in loads)),
    }
    if 1 < len(loads) <= MAX_SHOWN_SHARDS:
        for index, load in enumerate(loads):
            figures |= {f"shard_{index}_{name}": float(v) for name, v in asdict(load).items()}
    return figures


class QueuedPush:
    """A push in the queue, from its arrival until its update starts."""

    def __init__(self, queue: "PushQueue") -> None:
        self._queue, self._waiting = queue, True
        self.arrived_at = time.perf_counter()
        self.depth = queue.count(1)

    def leave(self) -> None:
        """Remove the push from the queue; idempotent."""
        if self._waiting:
            self._waiting = False
            self._queue.count(-1)


class PushQueue:
    """Counts the waiting pushes of a shard."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0

    def count(self, change: int) -> int:
        """Add `change` to the number of waiting pushes; return the new number."""
        with self._lock:
            self._depth += change
            return self._depth

    @contextmanager
    def enter(self) -> Iterator[QueuedPush]:
        """Count a push as waiting until the block ends or the push leaves."""
        queued = QueuedPush(self)
        try:
            yield queued
        finally:
            queued.leave()
