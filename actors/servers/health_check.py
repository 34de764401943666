"""Health checks of servers that have no backup: the first loss ends the attempt."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from distplat.actors.transport import ActorDied, NotHere, Transport, Unanswered
from distplat.platform.errors import ActorLost, DistplatError

logger = logging.getLogger(__name__)

WATCH_S = 0.5
"""Period of the look at the server nodes."""


class HealthCheck:
    """
    Notes the first server that dies, or does not answer.

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
        self._transport, self._servers, self._limit_s = transport, servers, limit_s
        self.lost: DistplatError | None = None
        self._losing, self._closed = losing, threading.Event()
        self._begun_at: float | None = None
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def begin(self) -> None:
        """All servers have their shards."""
        self._begun_at = time.monotonic()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _watch(self) -> None:
        """Look until somebody is lost, or this manager is of no use."""
        try:
            self._watch_all()
        except DistplatError as error:
            self.lost = error
        except BaseException as error:
            logger.exception("the health checks ended")
            self.lost = ActorLost("server-manager", None, f"its health checks ended: {error!r}")
        if self.lost is not None:
            self._losing.set()

    def _watch_all(self) -> None:
        heard = dict.fromkeys(range(len(self._servers)), time.monotonic())
        while self.lost is None and not self._closed.is_set():
            for index in heard:
                self.lost = self.lost or self._look(index, heard)
            if self.lost is not None:
                return
            self._closed.wait(WATCH_S)

    def _look(self, index: int, heard: dict[int, float]) -> DistplatError | None:
        """Ask one server whether it lives; `heard`: when each last said so."""
        name, asked = f"server-{index}", time.monotonic()
        question = self._transport.call(self._servers[index], "where")
        while True:
            try:
                self._transport.get(question, min(WATCH_S, self._limit_s))
            except Unanswered as error:
                if self._is_late(heard[index]):  # one lost answer is no lost server
                    return ActorLost(name, None, str(error))
                return None
            except ActorDied as error:
                return ActorLost(name, None, str(error))
            except NotHere:
                if self._is_late(asked):
                    cause = f"it has not answered for {self._limit_s:g} s (frozen or cut off)"
                    return ActorLost(name, None, cause)
                continue
            heard[index] = time.monotonic()
            return None

    def _is_late(self, since: float) -> bool:
        begun = self._begun_at
        return begun is not None and time.monotonic() - max(since, begun) > self._limit_s
