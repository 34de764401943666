"""How a worker learns that a store is served by others now: one question open to the manager."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from distplat.actors.messages import Membership, TableMap
from distplat.actors.retrying_calls import AGAIN_S, LOOK_S
from distplat.actors.transport import ActorDied, Transport, Unanswered
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import Abandoned, ActorLost, FencedError
from distplat.platform.spec import Failure

_ASK_S = 10.0
"""How long the manager keeps a question before it says that there is nothing new."""
_GRACE_S = 10.0
"""A lost server is noticed within the heartbeat's deadline, and its backup promoted soon after."""


Map = TypeVar("Map", Membership, TableMap)
Result = TypeVar("Result")
Ask = Callable[[int, float], Any]
"""Asks the manager for a newer map than of this version, which it may wait for; gives the reply."""


class MapChanged(Exception):
    """A newer map of the servers is there."""


class MapWatcher(Generic[Map]):
    """
    Keeps a worker's map of the servers up to date.

    Args:
        transport: the worker's.
        ask: see `Ask`.
        version: of the map that the worker has.
        limits: the job's deadlines.
    """

    def __init__(self, transport: Transport, ask: Ask, version: int, limits: Failure) -> None:
        self._transport, self._ask, self._limits = transport, ask, limits
        self._version = version
        self._newer: Map | None = None
        self._question = self._ask(version, _ASK_S)

    def look(self) -> None:
        """
        See whether there is news; called now and then by who waits for a server.

        Raises:
            MapChanged: there is a newer map.
            ActorLost: a server was lost with all that it kept, or the manager.
        """
        if self._transport.wait([self._question], 0.0):
            self._take_answer()
        if self._newer is not None:
            raise MapChanged

    def follow(self, error: Exception, check: Callable[[], object]) -> Map:
        """
        Give the newer map, once it is there.

        Args:
            error: why it is wanted; raised if none comes.
            check: called ten times a second; what it raises ends the wait.
        """
        clock, limit_s = AwakeClock(), self._limits.heartbeat_timeout_s + _GRACE_S
        while self._newer is None:
            check()
            if clock.now() > limit_s:
                raise error
            if self._transport.wait([self._question], LOOK_S):
                self._take_answer()
        found, self._newer = self._newer, None
        self._version = found.version
        return found

    def _take_answer(self) -> None:
        try:
            self._newer = self._transport.get(self._question, _GRACE_S)
        except Unanswered:
            time.sleep(AGAIN_S)  # the answer got lost; ask again
        except ActorDied as error:
            raise ActorLost("server-manager", None, str(error)) from None
        if self._newer is not None:
            self._version = self._newer.version
        self._question = self._ask(self._version, _ASK_S)


class ServerWatch(Generic[Map]):
    """
    Whether a worker's waits for servers are still of use.

    Args:
        rank: the worker's.
        abandoned: once set, waits come to their end.
    """

    def __init__(self, rank: int, abandoned: threading.Event) -> None:
        self._rank, self._abandoned = rank, abandoned
        self.watcher: MapWatcher[Map] | None = None  #: None: no server has a backup

    def check(self) -> None:
        """
        See whether this attempt is still on.

        Raises:
            Abandoned: it is not.
        """
        if self._abandoned.is_set():
            raise Abandoned(f"rank {self._rank} was told to wait no longer")

    def look(self) -> None:
        """
        See whether a wait is still of use.

        Raises:
            Abandoned, MapChanged, ActorLost: it is not.
        """
        self.check()
        if self.watcher is not None:
            self.watcher.look()

    def next_map(self, error: Exception) -> Map:
        """Give the map that follows a loss, once it is there; see `MapWatcher.follow`."""
        assert self.watcher is not None, "a loss is raised where no server has a backup"
        return self.watcher.follow(error, self.check)

    def following(
        self, action: Callable[[], Result], follow: Callable[[Exception], object]
    ) -> Result:
        """
        Do something with servers; once more where a lost one has a backup.

        Args:
            action: what to do.
            follow: goes over to the servers that there are now; is told why.
        """
        while True:
            try:
                self.look()
                return action()
            except (ActorLost, FencedError, MapChanged) as error:
                if self.watcher is None:
                    raise
                follow(error)
