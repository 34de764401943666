"""How a worker learns that a store is served by others now: one question open to the manager."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from distplat.actors.messages import Membership, TableMap
from distplat.actors.retrying_calls import POLL_S, RETRY_PAUSE_S
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


_LOSSES = (ActorLost, FencedError, MapChanged)
"""What is raised where somebody else may serve by now."""


class ServerWatch(Generic[Map]):
    """
    Whether a worker's waits for servers may still succeed, and which servers follow a loss.

    Args:
        transport: the worker's.
        rank: the worker's.
        limits: the job's deadlines.
        abandoned: once set, waits come to their end.
    """

    def __init__(
        self, transport: Transport, rank: int, limits: Failure, abandoned: threading.Event
    ) -> None:
        self._transport, self._rank, self._limits = transport, rank, limits
        self._abandoned = abandoned
        self._ask: Ask | None = None
        self._question: Any = None
        self._version = 0  #: of the map that the worker has, or is about to take
        self._newer: Map | None = None

    def begin(self, ask: Ask, version: int) -> None:
        """Hear of newer maps than of this version: servers have backups."""
        self._ask, self._version = ask, version
        self._question = ask(version, _ASK_S)

    @property
    def begun(self) -> bool:
        """Whether a lost server is followed by another one."""
        return self._ask is not None

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
        Check whether a wait may still succeed; called repeatedly while a server is waited for.

        Raises:
            Abandoned: the attempt is not on any more.
            MapChanged: there is a newer map.
            ActorLost: a server was lost with all that it kept, or the manager.
        """
        self.check()
        if self._question is not None and self._transport.wait([self._question], 0.0):
            self._take_answer()
        if self._newer is not None:
            raise MapChanged

    def following(self, action: Callable[[], Result], go_over: Callable[[Map], object]) -> Result:
        """
        Do something with servers; once more where a lost one has a backup.

        Args:
            action: what to do.
            go_over: goes over to the servers of a newer map.
        """
        while True:
            try:
                self.look()
                return action()
            except _LOSSES as error:
                if self._ask is None:
                    raise
                self._fail_over(error, go_over)

    def _fail_over(self, error: Exception, go_over: Callable[[Map], object]) -> None:
        while True:
            newest = self._next_map(error)
            try:
                go_over(newest)
                return
            except _LOSSES as again:
                error = again

    def _next_map(self, error: Exception) -> Map:
        """Give the newer map, once it is there; where none comes, raise why it is wanted."""
        clock, limit_s = AwakeClock(), self._limits.heartbeat_timeout_s + _GRACE_S
        while self._newer is None:
            self.check()
            if clock.now() > limit_s:
                raise error
            if self._transport.wait([self._question], POLL_S):
                self._take_answer()
        newest, self._newer = self._newer, None
        return newest

    def _take_answer(self) -> None:
        assert self._ask is not None, "there is a question"
        try:
            self._newer = self._transport.get(self._question, _GRACE_S)
        except Unanswered:
            time.sleep(RETRY_PAUSE_S)  # the answer got lost; ask again
        except ActorDied as error:
            raise ActorLost("server-manager", None, str(error)) from None
        if self._newer is not None:
            self._version = self._newer.version
        self._question = self._ask(self._version, _ASK_S)
