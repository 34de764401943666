"""
The load of shards: bytes, seconds of work, and the queue of pushes.

    push comes ──▶ |  queue: others stand before it, or the step misses gradients  | apply |
                   ^ depth: pushes that stand here now, this one too

Measured at the server, push by push, and told in the answer; bytes are counted by the worker.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

MAX_SHOWN_SHARDS = 16
"""Shards of which a line of metrics tells each by itself."""


@dataclass(frozen=True)
class ShardLoad:
    """What one push of one rank cost one shard."""

    in_bytes: int = 0
    """Bytes of the gradient, as it travelled or lay in shared memory."""
    out_bytes: int = 0
    """Bytes of the parameters that came back; 0 where the worker computes on the server's own."""
    apply_s: float = 0.0
    """What summing and updating took."""
    queue_s: float = 0.0
    """How long the push stood before the update that it is part of began."""
    queue_depth: int = 0
    """Pushes that stood there when it came, itself included."""


def load_figures(loads: Sequence[ShardLoad]) -> dict[str, float]:
    """
    Give the figures of a step: of the slowest shard, of all together, and of each one.

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
    """One push from its arrival at a shard until the update that it is part of begins."""

    def __init__(self, queue: "PushQueue") -> None:
        self._queue, self._waiting = queue, True
        self.at = time.perf_counter()
        self.depth = queue.count(1)

    def leave(self) -> None:
        """Take the push out of the queue; idempotent."""
        if self._waiting:
            self._waiting = False
            self._queue.count(-1)


class PushQueue:
    """Counts the pushes that wait at a shard."""

    def __init__(self) -> None:
        self._lock, self._here = threading.Lock(), 0

    def count(self, change: int) -> int:
        """Add `change` to the number of waiting pushes; return the new number."""
        with self._lock:
            self._here += change
            return self._here

    @contextmanager
    def enter(self) -> Iterator[QueuedPush]:
        """Count a push as waiting until the block ends or it leaves."""
        queued = QueuedPush(self)
        try:
            yield queued
        finally:
            queued.leave()
