"""Waiting for other ranks, with an eye on what may happen to them: death, leave, deadline."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from distplat.actors.memory.futex import Word, reached
from distplat.actors.memory.processes import has_ended
from distplat.actors.shm.arena import Arena
from distplat.platform.errors import CollectiveError

SLICE_S = 0.1
"""How often who waits looks round."""


TOLD = "this rank was told to give up"


class Activity:
    """One operation of this rank, for errors and accounts."""

    __slots__ = ("began", "name", "number", "waited")

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.began, self.waited = time.perf_counter(), 0.0


class Watch:
    """
    One rank's waits in a group.

    Args:
        group: its name, for errors.
        arena: what the ranks share.
        operation_s: deadline of an operation.
        abandoned: once set, waits end.
    """

    def __init__(
        self, group: str, arena: Arena, operation_s: float, abandoned: threading.Event
    ) -> None:
        self._group, self._arena = group, arena
        self._operation_s, self._abandoned = operation_s, abandoned
        self._given_up: tuple[str, tuple[int, ...]] | None = None
        self._deaths: dict[int, int] = {}

    def observe(self) -> None:
        """Take hold of the other ranks' processes, to learn of their deaths; all have entered."""
        for rank in range(self._arena.layout.world):
            pid = self._arena.pid(rank)
            if pid != os.getpid():  # in tests, ranks are threads of one process
                with suppress(PermissionError, AttributeError):  # then only the deadline tells
                    self._deaths[rank] = _open_process(pid)

    def close(self) -> None:
        """Let go of the processes."""
        while self._deaths:
            _, descriptor = self._deaths.popitem()
            if descriptor >= 0:
                os.close(descriptor)

    def give_up(self, why: str, missing: tuple[int, ...] = ()) -> None:
        """Make waits of this rank fail soon, with this cause; from any thread."""
        self._given_up = self._given_up or (why, missing)
        self._arena.wake()

    def check(self, activity: Activity) -> None:
        """
        Look whether this rank may go on at all.

        Raises:
            CollectiveError: it gave up.
        """
        if self._given_up is None and self._abandoned.is_set():
            self._given_up = TOLD, ()
        if self._given_up is not None:
            why, missing = self._given_up
            raise CollectiveError(self._group, activity.name, activity.number, missing, why)

    def until(self, word: Word, target: int, peer: int, activity: Activity) -> None:
        """
        Sleep until a rank's word has come to `target`.

        Raises:
            CollectiveError: the rank died or left, the deadline passed, or this rank gave up.
        """
        self._until(lambda slice_s: word.wait(target, slice_s), lambda: [peer], activity)

    def until_all(self, target: int, activity: Activity) -> None:
        """
        Sleep until every rank has made `target` posts.

        Raises:
            CollectiveError: as `until`; `missing` are all who have made fewer.
        """
        arena = self._arena

        def behind() -> list[int]:
            ranks = range(arena.layout.world)
            return [r for r in ranks if not reached(arena.words[r].value, target)]

        for word in arena.words:
            self._until(lambda slice_s, w=word: w.wait(target, slice_s), behind, activity)  # type: ignore[misc]

    def _until(
        self, wait: Callable[[float], bool], behind: Callable[[], list[int]], activity: Activity
    ) -> None:
        began = time.perf_counter()
        deadline = activity.began + self._operation_s
        try:
            while not wait(min(SLICE_S, max(0.0, deadline - time.perf_counter()))):
                self._look_round(behind(), activity, wait)
        finally:
            activity.waited += time.perf_counter() - began

    def _look_round(
        self, behind: list[int], activity: Activity, wait: Callable[[float], bool]
    ) -> None:
        self.check(activity)
        dead = tuple(rank for rank in behind if self._is_dead(rank))
        left = tuple(rank for rank in behind if self._arena.has_left(rank))
        late = time.perf_counter() - activity.began >= self._operation_s
        # Who died or left may have posted before: look at the word once more.
        if not (dead or left or late) or wait(0.0):
            return
        cause = f"deadline {self._operation_s:g} s"
        if dead or left:
            cause = "its process died" if dead else "it left the group, or failed in it"
        missing = dead or left or tuple(behind)
        raise CollectiveError(self._group, activity.name, activity.number, missing, cause)

    def _is_dead(self, rank: int) -> bool:
        descriptor = self._deaths.get(rank)
        if descriptor is None:
            return False
        return descriptor < 0 or has_ended(descriptor)


def _open_process(pid: int) -> int:
    """Give a descriptor that becomes readable when the process ends; -1: it has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
