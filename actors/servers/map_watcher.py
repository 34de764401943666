"""Failover of a worker's calls: one open request to the manager returns newer server maps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from distplat.actors.messages import Membership, TableMap
from distplat.actors.retrying_calls import POLL_S, RETRY_PAUSE_S
from distplat.actors.transport import ActorDied, Transport, Unanswered
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import Abandoned, ActorLost, FencedError, InfrastructureError
from distplat.platform.spec import Failure

_ASK_S = 10.0
"""How long the manager holds a request before it answers that the map has not changed."""
_GRACE_S = 10.0
"""Time for a promotion, after the heartbeat timeout within which a lost server is detected."""


Map = TypeVar("Map", Membership, TableMap)
Result = TypeVar("Result")
Ask = Callable[[int, float], Any]
"""Requests a map newer than a version from the manager, with a time limit; returns the reply."""


class MapChanged(InfrastructureError):
    """The manager has sent a newer map of the servers. Outside a failover the attempt restarts."""


_FAILOVER_ERRORS = (ActorLost, FencedError, MapChanged)
"""Errors after which another server may serve."""


class ServerWatch(Generic[Map]):
    """
    Watch for newer server maps, end waits that cannot succeed, and repeat calls after a failover.

    Args:
        transport: the worker's.
        rank: the worker's.
        limits: the job's deadlines.
        abandoned: once set, waits end.
    """

    def __init__(
        self, transport: Transport, rank: int, limits: Failure, abandoned: threading.Event
    ) -> None:
        self._transport, self._rank, self._limits = transport, rank, limits
        self._abandoned = abandoned
        self._ask: Ask | None = None
        self._request: Any = None
        self._version = 0  #: of the newest map that has arrived
        self._newer: Map | None = None

    def begin(self, ask: Ask, version: int) -> None:
        """Start to watch for maps newer than `version`: the servers have backups."""
        self._ask, self._version = ask, version
        self._request = ask(version, _ASK_S)

    @property
    def has_backups(self) -> bool:
        """Whether a backup replaces a lost server."""
        return self._ask is not None

    def check_attempt(self) -> None:
        """
        Check that this attempt has not ended.

        Raises:
            Abandoned: the worker was told to stop waiting.
        """
        if self._abandoned.is_set():
            raise Abandoned(f"rank {self._rank} was told to wait no longer")

    def check(self) -> None:
        """
        Check whether a wait for a server may still succeed; called repeatedly during the wait.

        Raises:
            Abandoned: the attempt has ended.
            MapChanged: a newer map has arrived.
            ActorLost: the manager, or a server without a filled backup, was lost.
        """
        self.check_attempt()
        if self._request is not None and self._transport.wait([self._request], 0.0):
            self._receive_map()
        if self._newer is not None:
            raise MapChanged("a server was lost, and its backup has replaced it")

    def with_failover(
        self, action: Callable[[], Result], reconnect: Callable[[Map], object]
    ) -> Result:
        """
        Call the servers; repeat the call after a failover.

        Args:
            action: calls the servers.
            reconnect: connects to the servers of a newer map.
        """
        while True:
            try:
                self.check()
                return action()
            except _FAILOVER_ERRORS as error:
                if self._ask is None:
                    raise
                self._fail_over(error, reconnect)

    def _fail_over(self, error: Exception, reconnect: Callable[[Map], object]) -> None:
        while True:
            newest = self._next_map(error)
            try:
                reconnect(newest)
                return
            except _FAILOVER_ERRORS as next_error:
                error = next_error

    def _next_map(self, error: Exception) -> Map:
        """Wait for a newer map and return it; raise `error` if none arrives in time."""
        clock, limit_s = AwakeClock(), self._limits.heartbeat_timeout_s + _GRACE_S
        while self._newer is None:
            self.check_attempt()
            if clock.now() > limit_s:
                raise error
            if self._transport.wait([self._request], POLL_S):
                self._receive_map()
        newest, self._newer = self._newer, None
        return newest

    def _receive_map(self) -> None:
        assert self._ask is not None, "a request is open"
        try:
            self._newer = self._transport.get(self._request, _GRACE_S)
        except Unanswered:
            time.sleep(RETRY_PAUSE_S)  # the reply was lost: repeat the request
        except ActorDied as error:
            raise ActorLost("server-manager", None, str(error)) from None
        if self._newer is not None:
            self._version = self._newer.version
        self._request = self._ask(self._version, _ASK_S)
