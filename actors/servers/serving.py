"""Base class of server nodes, of parameters and of embedding tables: replication and polls."""

import time
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from distplat.actors.messages import MemoryAddress
from distplat.actors.servers.replication import Replication
from distplat.actors.transport import Transport
from distplat.platform.errors import FencedError
from distplat.platform.server_group import ServerReport
from distplat.strategies.server.server import Server
from distplat.strategies.server.store import Change, StoreSnapshot

AnyServer = TypeVar("AnyServer", bound=Server[Any])


class Serving(ABC, Generic[AnyServer]):
    """
    Implementation of a server node.

    Args:
        name: of the server, for messages.
        transport: for calls to other actors.
    """

    _server: AnyServer
    _replication: Replication

    def __init__(self, name: str, transport: Transport) -> None:
        self._name, self._transport, self._node = name, transport, transport.node

    @property
    def server(self) -> AnyServer | None:
        """The server; None: no store was assigned yet."""
        return self._server

    @abstractmethod
    def held(self) -> ServerReport:
        """Return the shard and role of this server; called by a restarted manager."""

    def close(self) -> None:
        """Release resources that the end of the process would free as well."""

    def poll(self, number: int, hold_s: float) -> None:
        """Answer a health check after `hold_s` seconds."""
        time.sleep(hold_s)

    def where(self) -> str:
        """Return the ID of this server's node."""
        return self._node

    def log(self) -> NDArray[Any] | None:
        """Return the log of updates; None if none is kept, or before a shard was assigned."""
        server = self.server
        return None if server is None else server.exclusively(server.store.log)

    def replicate_to(self, term: int, name: str, handle: Any) -> None:
        """Copy the store to a backup and keep it up to date; see `Replication.replicate_to`."""
        store, replicate_to = self._server.store, self._replication.replicate_to
        self._server.exclusively(lambda: replicate_to(term, name, handle, store.opened))

    def take_over(self, term: int, snapshot: StoreSnapshot, inbox: MemoryAddress | None) -> bool:
        """Become a primary's backup; see `Replication.take_over`."""
        take_over = self._replication.take_over
        return self._server.exclusively(lambda: take_over(term, snapshot, inbox))

    def update(self, term: int, number: int, change: Change, gradient: Any) -> None:
        """Apply an update of the primary; see `Replication.follow`."""
        follow = self._replication.follow
        self._server.exclusively(lambda: follow(term, number, change, gradient))

    def promote(self, term: int) -> MemoryAddress | None:
        """Become the serving server; return the address of the parameters, if there is one."""
        if not self._server.exclusively(lambda: self._replication.alone(term)):
            raise FencedError(f"{self._name} is past term {term}")
        return self._promoted(term)

    def _promoted(self, term: int) -> MemoryAddress | None:
        return None

    def alone(self, term: int) -> None:
        """
        Continue without a backup.

        The role changes without the server's lock: an update that waits for the backup may hold it.
        """
        self._replication.alone(term)
        self._server.exclusively(lambda: None)  # wakes threads that wait for `settled`
