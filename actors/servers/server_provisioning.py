"""
New server nodes for the server manager: it says which, and the controller makes them.

    replication manager ── make ──▶ provisioning ── poll ──▶ controller ── spawn ──▶ server-4
        ◀────── handle ──────┘ ◀───────── bring ─────┘

An actor ends with the process that made it. So the controller makes servers, not the manager: a
manager that is lost takes none with it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from distplat.platform.errors import DeadlineExceeded


@dataclass(frozen=True)
class ServerRequest:
    """A server node that somebody is to make."""

    server: str
    """Its name."""
    beside: str
    """The node on which it should rather not be."""


class ServerProvisioning:
    """
    Servers that are wanted, and those that have come.

    Args:
        limit_s: how long one may take to come.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._changed = threading.Condition()
        self._wanted: dict[str, ServerRequest] = {}
        self._come: dict[str, Any] = {}

    def make(self, server: str, beside: str) -> Any:
        """
        Have a server made; give its handle.

        Raises:
            DeadlineExceeded: nobody made it.
        """
        with self._changed:
            self._wanted[server] = ServerRequest(server, beside)
            self._changed.notify_all()
            came = self._changed.wait_for(lambda: server in self._come, self._limit_s)
            self._wanted.pop(server, None)
            if not came:
                limit = self._limit_s
                raise DeadlineExceeded("a new server", (server,), limit, "failure.start_timeout_s")
            return self._come.pop(server)

    def next(self, hold_s: float) -> ServerRequest | None:
        """Give one that is wanted, again until it has come; waits so long for there to be one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._wanted), hold_s)
            return next(iter(self._wanted.values()), None)

    def bring(self, server: str, handle: Any) -> None:
        """Take one that was made; twice does nothing."""
        with self._changed:
            if server in self._wanted:
                del self._wanted[server]
                self._come[server] = handle
                self._changed.notify_all()
