"""
Health checks of servers: one open poll per server detects dead and unresponsive servers.

    server-0   poll ──▶ 0.5 s later ──▶ None   polled again at once   healthy
    server-1   poll ──▶ ActorDied                                     lost: the process died
    server-2   poll ──▶ ...                    heartbeat_timeout_s    lost: frozen, or unreachable
    server-3   poll ──▶ Unanswered             polled again           the reply was lost, no server

A server delays its reply, so that a poll is open whenever the server dies: Ray fails the open call
20 ms after the end of the process.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from typing import Any

from distplat.actors.transport import ActorDied, Transport, Unanswered
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import ActorLost, DistplatError

logger = logging.getLogger(__name__)

TICK_S = 0.05
"""Period at which replies are checked."""
_HOLD_S = 0.5
"""How long a server delays its reply to a poll; the first poll is answered at once."""


class Heartbeats:
    """
    Open polls of servers; not thread-safe.

    Args:
        transport: the manager's.
        limit_s: how long a server may be silent.
    """

    def __init__(self, transport: Transport, limit_s: float) -> None:
        self._transport, self._limit_s = transport, limit_s
        self._clock = AwakeClock()
        self._open: dict[Any, tuple[str, float]] = {}  #: poll -> (server, when its reply is due)
        self._answered: set[str] = set()  #: servers that have answered a poll
        self._silent_since: dict[str, float] = {}  #: server -> start of its current silence

    def has_answered(self, server: str) -> bool:
        """Return whether a server has answered a poll."""
        return server in self._answered

    def find_lost(self, servers: Mapping[str, Any], starting: Collection[str]) -> dict[str, str]:
        """
        Process the replies that have arrived, and poll every server without an open poll.

        Args:
            servers: handles, by name; servers that are missing here are not polled any more.
            starting: servers that may be silent for any time.

        Returns:
            Lost servers, with the cause.
        """
        now = self._clock.now()
        self._poll(servers, now)
        for name in starting:
            self._silent_since[name] = now
        lost = {name: cause for name, cause in self._process(now).items() if name in servers}
        for poll, (name, due) in list(self._open.items()):
            if now - max(due, self._silent_since[name]) > self._limit_s:
                del self._open[poll]
                if name in servers:
                    lost[name] = self._silence("frozen or cut off")
        return lost

    def _silence(self, why: str) -> str:
        setting = "`failure.heartbeat_timeout_s` changes this deadline"
        return f"it has not answered for {self._limit_s:g} s ({why}); {setting}"

    def _poll(self, servers: Mapping[str, Any], now: float) -> None:
        polled = {name for name, _ in self._open.values()}
        for name, handle in servers.items():
            if name not in polled:
                self._silent_since.setdefault(name, now)
                hold_s = _HOLD_S if name in self._answered else 0.0
                poll = self._transport.call(handle, "poll", 0, hold_s)
                self._open[poll] = name, now + hold_s

    def _process(self, now: float) -> dict[str, str]:
        """Process the replies that have arrived; return the servers that they show to be lost."""
        polls, lost = list(self._open), {}
        arrived = self._transport.wait(polls, 0.0, everything=True) if polls else []
        for poll in arrived:
            name, _ = self._open.pop(poll)
            try:
                self._transport.get(poll, 0.0)
            except Unanswered as error:  # a lost reply does not mean a lost server
                if now - self._silent_since[name] > self._limit_s:
                    lost[name] = self._silence(str(error))
            except ActorDied as error:
                lost[name] = str(error)
            else:
                self._answered.add(name)
                self._silent_since[name] = now
        return lost


class HealthCheck:
    """
    Detect the first server that dies or stops answering, in a group without backups.

    While a server is assigned its shard, it loads torch and may be silent for longer than
    `limit_s`; the assignment has its own deadline. So silence counts only after `begin`, a death
    at any time.

    Args:
        transport: the manager's.
        servers: handles, in order.
        limit_s: how long a server may be silent.
        losing: set once `lost` is set.
    """

    def __init__(
        self, transport: Transport, servers: list[Any], limit_s: float, losing: threading.Event
    ) -> None:
        self._servers = {f"server-{index}": handle for index, handle in enumerate(servers)}
        self._heartbeats = Heartbeats(transport, limit_s)
        self.lost: DistplatError | None = None
        self._losing, self._closed = losing, threading.Event()
        self._all_assigned = False
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def begin(self) -> None:
        """Start to count silence: all servers have their shards."""
        self._all_assigned = True

    def close(self) -> None:
        """Stop the checks."""
        self._closed.set()

    def _watch(self) -> None:
        """Check until a server is lost or the checks are stopped."""
        try:
            while self.lost is None and not self._closed.wait(TICK_S):
                starting = () if self._all_assigned else self._servers
                for name, cause in self._heartbeats.find_lost(self._servers, starting).items():
                    self.lost = self.lost or ActorLost(name, None, cause)
        except BaseException as error:
            logger.exception("the health checks ended")
            self.lost = ActorLost("server-manager", None, f"its health checks ended: {error!r}")
        if self.lost is not None:
            self._losing.set()
