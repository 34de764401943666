"""How a worker learns that shards are served by others now: one question open to the manager."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from distplat.actors.messages import Membership
from distplat.actors.retrying_calls import AGAIN_S, LOOK_S
from distplat.actors.transport import ActorDied, Transport, Unanswered
from distplat.platform.errors import ActorLost
from distplat.platform.spec import Failure

_ASK_S = 10.0
"""How long the manager keeps a question before it says that there is nothing new."""
_GRACE_S = 10.0
"""A lost server is noticed within the heartbeat's deadline, and its backup promoted soon after."""


class MapChanged(Exception):
    """A newer map of the servers is there."""


class ShardMapWatcher:
    """
    Keeps a worker's map of the servers up to date.

    Args:
        transport: the worker's.
        manager: handle of the server manager.
        joined: the map that the worker has.
        limits: the job's deadlines.
    """

    def __init__(
        self, transport: Transport, manager: Any, joined: Membership, limits: Failure
    ) -> None:
        self._transport, self._manager, self._limits = transport, manager, limits
        self._part, self._place = joined.part, joined.place
        self._version = joined.shard_map.version
        self._newer: Membership | None = None
        self._question = self._ask()

    def look(self) -> None:
        """
        See whether there is news; called now and then by who waits for a server.

        Raises:
            MapChanged: there is a newer map.
            ActorLost: a shard was lost for good, or the manager.
        """
        if self._transport.wait([self._question], 0.0):
            self._take_answer()
        if self._newer is not None:
            raise MapChanged

    def follow(self, error: Exception, check: Callable[[], object]) -> Membership:
        """
        Give the newer map, once it is there.

        Args:
            error: why it is wanted; raised if none comes.
            check: called ten times a second; what it raises ends the wait.
        """
        until = time.monotonic() + self._limits.heartbeat_timeout_s + _GRACE_S
        while self._newer is None:
            check()
            if time.monotonic() > until:
                raise error
            if self._transport.wait([self._question], LOOK_S):
                self._take_answer()
        found, self._newer = self._newer, None
        self._version = found.shard_map.version
        return found

    def _take_answer(self) -> None:
        try:
            self._newer = self._transport.get(self._question, _GRACE_S)
        except Unanswered:
            time.sleep(AGAIN_S)  # the answer got lost; ask again
        except ActorDied as error:
            raise ActorLost("server-manager", None, str(error)) from None
        if self._newer is not None:
            self._version = self._newer.shard_map.version
        self._question = self._ask()

    def _ask(self) -> Any:
        known = self._part, self._place, self._version
        return self._transport.call(self._manager, "follow", *known, _ASK_S)
