"""
Who is missing in a torch group: every rank leaves heartbeats in the group's store.

    in the store      heartbeat/0 = "41 12"     41 heartbeats, 12 operations begun
                      heartbeat/1 = "left 12"   it has closed the group
                      missing = "2"             what the first rank that failed found out

gloo says that an operation failed, not because of whom. A rank whose operation failed reads all
heartbeats twice, two seconds apart. A rank without a new one is dead or frozen; if all have one, a
rank that has not begun the operation is late. The result stays in the store: other ranks then need
not look, and name the same ranks.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

INTERVAL_S = 0.5
SILENT_S = 4 * INTERVAL_S
"""A rank without a heartbeat for so long is missing."""

_FOUND = "missing"


class _Heartbeat(NamedTuple):
    """The last one of a rank."""

    beats: str
    number: int

    @property
    def left(self) -> bool:
        return self.beats == "left"


class Heartbeat:
    """
    Publishes that this rank lives and how far it is; finds the ranks that do not.

    Args:
        store: a client of the group's store, used by this object alone.
        rank: place in the group.
        world: ranks in the group.
        number: gives the operations that this rank has begun.
        on_beat: called at each heartbeat.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        number: Callable[[], int],
        on_beat: Callable[[], None],
    ) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._number, self._on_beat = number, on_beat
        self._lock = threading.Lock()  # one store connection answers one question at a time
        self._stopped = threading.Event()
        self._beats = 0
        self._publish(str(self._beats))
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish no more, and that it is on purpose."""
        self._stopped.set()
        # Not for long: where rank 0 is frozen, a beat may be on its way for ever.
        self._thread.join(INTERVAL_S)
        # They lead back to the group: without the circle its sockets close as soon as it goes.
        self._on_beat, self._number = lambda: None, lambda: 0

    def missing(
        self, number: int, partner: int | None, gave_up: Callable[[], bool]
    ) -> tuple[int, ...]:
        """
        Find out because of whom an operation failed; takes about two seconds if nobody else has.

        Rank 0 keeps the store: if that does not answer, rank 0 is missing.

        Args:
            number: the operation that failed, if all ranks take part in it.
            partner: the other rank, if only two do.
            gave_up: whether nobody wants the answer any more.
        """
        found: list[tuple[int, ...]] = []
        # In a thread of its own: a frozen rank 0 leaves a question to its store open for ever.
        look = threading.Thread(
            target=lambda: found.append(self._look(number, partner)), daemon=True
        )
        look.start()
        deadline = time.monotonic() + 2 * SILENT_S
        while look.is_alive() and time.monotonic() < deadline:
            if gave_up():
                return ()
            look.join(0.05)
        return found[0] if found else (0,)

    def _look(self, number: int, partner: int | None) -> tuple[int, ...]:
        try:
            found = self._found()
            if found is None:
                found = self._compare(number, partner)
                self._leave(found)
        except (RuntimeError, ValueError):
            return (0,)
        # The others gave up on this rank; it came late, and misses nobody.
        return () if self._rank in found else found

    def _found(self) -> tuple[int, ...] | None:
        """Give what another rank found out."""
        with self._lock:
            if not self._store.check([_FOUND]):
                return None
            return tuple(int(rank) for rank in self._store.get(_FOUND).decode().split())

    def _leave(self, found: tuple[int, ...]) -> None:
        if found:
            with self._lock:
                self._store.set(_FOUND, " ".join(map(str, found)))

    def _compare(self, number: int, partner: int | None) -> tuple[int, ...]:
        before = self._read()
        deadline = time.monotonic() + SILENT_S
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
            if (found := self._found()) is not None:
                return found
        after = self._read()
        others = [rank for rank in range(self._world) if rank != self._rank]
        silent = [r for r in others if before[r] == after[r] and not after[r].left]
        late = [r for r in others if after[r].number < number and not after[r].left]
        left_us = [r for r in others if after[r].left]
        return tuple(silent or ([partner] if partner is not None else late) or left_us)

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            self._on_beat()
            self._beats += 1
            if not self._publish(str(self._beats)):
                return  # rank 0 has closed the store: the group is over
        self._publish("left")

    def _publish(self, beats: str) -> bool:
        try:
            with self._lock:
                self._store.set(f"heartbeat/{self._rank}", f"{beats} {self._number()}")
        except RuntimeError:
            return False
        return True

    def _read(self) -> list[_Heartbeat]:
        """Give every rank's heartbeat; no beats and no operations for one that never came."""
        beats_of = []
        with self._lock:
            for rank in range(self._world):
                key = f"heartbeat/{rank}"
                value = self._store.get(key).decode() if self._store.check([key]) else "0 0"
                beats, number = value.split()
                beats_of.append(_Heartbeat(beats, int(number)))
        return beats_of
