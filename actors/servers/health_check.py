"""
Health checks of servers: a question open to each, and who has not answered in time.

    server-0   poll ──▶ 0.5 s later ──▶ None   asked again at once   it is well
    server-1   poll ──▶ ActorDied                                    lost: it is gone
    server-2   poll ──▶ ...                    heartbeat_timeout_s   lost: frozen, or cut off
    server-3   poll ──▶ Unanswered             asked again           an answer is lost, no server

A server keeps its answer back, so that a question is open whenever it dies: Ray ends that
question at once, two hundredths of a second after the process.
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
"""Period of a look at the answers."""
_HOLD_S = 0.5
"""Seconds for which a server holds a poll open, once it has answered a first one."""


class Heartbeats:
    """
    What servers answer, for one thread.

    Args:
        transport: the manager's.
        limit_s: how long one may not answer.
    """

    def __init__(self, transport: Transport, limit_s: float) -> None:
        self._transport, self._limit_s = transport, limit_s
        self._clock = AwakeClock()
        self._open: dict[Any, tuple[str, float]] = {}  #: question -> (server, when it is due)
        self._heard: set[str] = set()  #: servers that have answered
        self._silent_since: dict[str, float] = {}  #: server -> from when on its silence counts

    def has_heard(self, server: str) -> bool:
        """Whether a server has answered once."""
        return server in self._heard

    def look(self, servers: Mapping[str, Any], starting: Collection[str]) -> dict[str, str]:
        """
        Take the answers that are here; ask every server to whom no question is open.

        Args:
            servers: handles, by name; who is not among them any more is asked no more.
            starting: those that may be silent for any time.

        Returns:
            Who is lost, and why.
        """
        now = self._clock.now()
        self._ask(servers, now)
        for name in starting:
            self._silent_since[name] = now
        lost = {name: cause for name, cause in self._answers(now).items() if name in servers}
        for question, (name, due) in list(self._open.items()):
            if now - max(due, self._silent_since[name]) > self._limit_s:
                del self._open[question]
                if name in servers:
                    lost[name] = self._silent("frozen or cut off")
        return lost

    def _silent(self, why: str) -> str:
        setting = "`failure.heartbeat_timeout_s` changes this deadline"
        return f"it has not answered for {self._limit_s:g} s ({why}); {setting}"

    def _ask(self, servers: Mapping[str, Any], now: float) -> None:
        asked = {name for name, _ in self._open.values()}
        for name, handle in servers.items():
            if name not in asked:
                self._silent_since.setdefault(name, now)
                hold_s = _HOLD_S if name in self._heard else 0.0
                question = self._transport.call(handle, "poll", 0, hold_s)
                self._open[question] = name, now + hold_s

    def _answers(self, now: float) -> dict[str, str]:
        """Take the answers that have arrived; give the servers that they show to be lost."""
        questions, lost = list(self._open), {}
        answered = self._transport.wait(questions, 0.0, everything=True) if questions else []
        for question in answered:
            name, _ = self._open.pop(question)
            try:
                self._transport.get(question, 0.0)
            except Unanswered as error:  # one lost answer is no lost server
                if now - self._silent_since[name] > self._limit_s:
                    lost[name] = self._silent(str(error))
            except ActorDied as error:
                lost[name] = str(error)
            else:
                self._heard.add(name)
                self._silent_since[name] = now
        return lost


class HealthCheck:
    """
    Notes the first server that dies, or does not answer, where none has a backup.

    One that is given its shard loads torch, and may be silent for longer than a heartbeat; whoever
    gives it out has a deadline of its own. So silence counts from `begin` on, a death at any time.

    Args:
        transport: the manager's.
        servers: handles, in order.
        limit_s: how long one may not answer.
        losing: set once there is something in `lost`.
    """

    def __init__(
        self, transport: Transport, servers: list[Any], limit_s: float, losing: threading.Event
    ) -> None:
        self._servers = {f"server-{index}": handle for index, handle in enumerate(servers)}
        self._heartbeats = Heartbeats(transport, limit_s)
        self.lost: DistplatError | None = None
        self._losing, self._closed = losing, threading.Event()
        self._begun = False
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def begin(self) -> None:
        """All servers have their shards."""
        self._begun = True

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _watch(self) -> None:
        """Check until a server is lost, or this is closed."""
        try:
            while self.lost is None and not self._closed.wait(TICK_S):
                starting = () if self._begun else self._servers
                for name, cause in self._heartbeats.look(self._servers, starting).items():
                    self.lost = self.lost or ActorLost(name, None, cause)
        except BaseException as error:
            logger.exception("the health checks ended")
            self.lost = ActorLost("server-manager", None, f"its health checks ended: {error!r}")
        if self.lost is not None:
            self._losing.set()
