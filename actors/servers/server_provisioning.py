"""
New server nodes for the server manager: it asks the controller, which makes them.

    replication manager ── make ──▶ provisioning ── make_server ──▶ controller ── spawn ──▶ server-4
        ◀────── handle ──────┘ ◀───────── handle ───────┘

An actor ends with the process that made it. So the controller makes servers, not the manager: a
manager that is lost takes none with it.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

from distplat.actors.retrying_calls import AGAIN_S, ask
from distplat.actors.transport import Transport
from distplat.platform.errors import DeadlineExceeded, NotReadyError

_SETTING = "start_timeout_s"


class ServerProvisioning:
    """
    The manager's way to new servers.

    Args:
        transport: the manager's.
        attempt: for which the manager was made; the controller refuses those before.
        limit_s: how long a server may take to come.
    """

    def __init__(self, transport: Transport, attempt: int, limit_s: float) -> None:
        self._transport, self._attempt, self._limit_s = transport, attempt, limit_s
        self._controller: Any = None
        self._begun = threading.Event()
        self._asking = threading.Lock()  # many questions at once would take all its threads

    def begin(self, controller: Any) -> None:
        """Take the controller, who is made after the first manager; twice does nothing."""
        self._controller = controller
        self._begun.set()

    def make(self, server: str, beside: str) -> Any:
        """
        Have a server made; give its handle.

        Args:
            server: its name.
            beside: the node on which it should rather not be.

        Raises:
            DeadlineExceeded: nobody made it.
            ActorLost: the controller is gone.
            FencedError: there is a later manager.
            NotReadyError: the controller has not begun.
        """
        if not self._begun.wait(self._limit_s):
            setting = f"failure.{_SETTING}"
            raise DeadlineExceeded("a new server", ("controller",), self._limit_s, setting)
        who = self._attempt, server, beside
        call = partial(self._transport.call, self._controller, "make_server", *who)
        until = time.monotonic() + self._limit_s
        given = self._transport, "a new server", [call], ["controller"]
        while True:
            try:
                with self._asking:
                    return ask(*given, self._limit_s, _SETTING)[0]
            except NotReadyError:  # its process has just started
                if time.monotonic() > until:
                    raise
                time.sleep(AGAIN_S)
