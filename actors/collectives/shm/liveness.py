"""Waits for other ranks that fail if one of them dies or leaves, or at a deadline."""

import os
import time
from collections.abc import Callable
from contextlib import suppress

from distplat.actors.collectives.rendezvous import GIVEN_UP, GroupSettings
from distplat.actors.collectives.shm.segment import GroupSegment
from distplat.actors.memory.futex import Word, has_ended, reached
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import CollectiveError

SLICE_S = 0.1
"""Period at which a wait checks the other ranks."""


class RunningOp:
    """A running operation of this rank, for errors and traffic counters."""

    __slots__ = ("clock", "name", "number", "start", "waiting_s")

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.start, self.waiting_s = time.perf_counter(), 0.0
        self.clock = AwakeClock()  #: for the deadline


class LivenessMonitor:
    """
    One rank's waits in a group.

    Args:
        group: name of the group, for errors.
        segment: the ranks' shared memory.
        settings: deadline of an operation, and abort event.
    """

    def __init__(self, group: str, segment: GroupSegment, settings: GroupSettings) -> None:
        self._group, self._segment, self._settings = group, segment, settings
        self._abandoned = settings.abandoned
        self._failure: tuple[str, tuple[int, ...]] | None = None  #: cause and missing ranks
        self._processes: dict[int, int] = {}

    def start(self) -> None:
        """Open the other ranks' processes to detect their deaths; all ranks have entered."""
        for rank in range(self._segment.world):
            pid = self._segment.pid(rank)
            if pid != os.getpid():  # in tests, ranks are threads of one process
                # Without permission, a death is detected only by the deadline.
                with suppress(PermissionError, AttributeError):
                    self._processes[rank] = _open_process(pid)

    def close(self) -> None:
        """Close the processes' descriptors."""
        while self._processes:
            _, descriptor = self._processes.popitem()
            if descriptor >= 0:
                os.close(descriptor)

    def abort(self, cause: str, missing: tuple[int, ...] = ()) -> None:
        """Make waits of this rank fail soon, with this cause; from any thread."""
        self._failure = self._failure or (cause, missing)
        self._segment.wake()

    def check(self, op: RunningOp) -> None:
        """
        Check whether this rank may continue.

        Raises:
            CollectiveError: the waits of this rank were aborted.
        """
        if self._failure is None and self._abandoned.is_set():
            self._failure = GIVEN_UP, ()
        if self._failure is not None:
            cause, missing = self._failure
            raise CollectiveError(self._group, op.name, op.number, missing, cause)

    def wait_for(self, word: Word, target: int, peer: int, op: RunningOp) -> None:
        """
        Sleep until a rank's word has reached `target`.

        Raises:
            CollectiveError: the rank died or left, the deadline passed, or this rank was aborted.
        """
        self._wait(lambda slice_s: word.wait(target, slice_s), lambda: [peer], op)

    def wait_for_all(self, target: int, op: RunningOp) -> None:
        """
        Sleep until every rank has made `target` posts.

        Raises:
            CollectiveError: as `wait_for`; `missing` are all ranks with fewer posts.
        """
        words = self._segment.words

        def behind() -> list[int]:
            return [rank for rank, word in enumerate(words) if not reached(word.value, target)]

        for word in words:
            self._wait(lambda slice_s, w=word: w.wait(target, slice_s), behind, op)  # type: ignore[misc]

    def _wait(
        self, wait: Callable[[float], bool], behind: Callable[[], list[int]], op: RunningOp
    ) -> None:
        start = time.perf_counter()
        try:
            while not wait(min(SLICE_S, max(0.0, self._settings.operation_s - op.clock.now()))):
                self._check_peers(behind(), op, wait)
        finally:
            op.waiting_s += time.perf_counter() - start

    def _check_peers(self, behind: list[int], op: RunningOp, wait: Callable[[float], bool]) -> None:
        self.check(op)
        dead = tuple(rank for rank in behind if self._is_dead(rank))
        left = tuple(rank for rank in behind if self._segment.has_left(rank))
        late = op.clock.now() >= self._settings.operation_s
        # A rank may have posted before it died or left: check the word again.
        if not (dead or left or late) or wait(0.0):
            return
        cause = self._settings.deadline
        if dead or left:
            cause = "its process died" if dead else "it left the group, or failed in it"
        missing = dead or left or tuple(behind)
        raise CollectiveError(self._group, op.name, op.number, missing, cause)

    def _is_dead(self, rank: int) -> bool:
        descriptor = self._processes.get(rank)
        if descriptor is None:
            return False
        return descriptor < 0 or has_ended(descriptor)


def _open_process(pid: int) -> int:
    """Return a descriptor that becomes readable when the process ends; -1: it has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
