"""What server nodes of parameters and of embedding tables have in common: being kept twice."""

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
    The body of a server node.

    Args:
        name: of the server, for messages.
        transport: its way to other actors.
    """

    _server: AnyServer
    _replication: Replication

    def __init__(self, name: str, transport: Transport) -> None:
        self._name, self._transport, self._node = name, transport, transport.node

    @property
    def server(self) -> AnyServer | None:
        """The store at work; None: there is none yet."""
        return self._server

    @abstractmethod
    def held(self) -> ServerReport:
        """Say what is kept here, and as what, to a manager that was not there before."""

    def close(self) -> None:
        """Let go of what a process's end would free, where there is such a thing."""

    def poll(self, number: int, hold_s: float) -> None:
        """Answer a poll after `hold_s` seconds: this process lives."""
        time.sleep(hold_s)

    def where(self) -> str:
        """Give the name of this server's node."""
        return self._node

    def log(self) -> NDArray[Any] | None:
        """Give the order of updates, if it is kept; None too before a shard was assigned."""
        server = self.server
        return None if server is None else server.exclusively(server.store.log)

    def replicate_to(self, term: int, name: str, handle: Any) -> None:
        """Fill a backup and keep it up to date; see `Replication.replicate_to`."""
        store, replicate_to = self._server.store, self._replication.replicate_to
        self._server.exclusively(lambda: replicate_to(term, name, handle, store.opened))

    def take_over(self, term: int, snapshot: StoreSnapshot, inbox: MemoryAddress | None) -> bool:
        """Become a primary's backup; see `Replication.take_over`."""
        take_over = self._replication.take_over
        return self._server.exclusively(lambda: take_over(term, snapshot, inbox))

    def update(self, term: int, number: int, change: Change, gradient: Any) -> None:
        """Do what the primary does; see `Replication.follow`."""
        follow = self._replication.follow
        self._server.exclusively(lambda: follow(term, number, change, gradient))

    def promote(self, term: int) -> MemoryAddress | None:
        """Serve from now on; give the address of the parameters, if there is one."""
        if not self._server.exclusively(lambda: self._replication.alone(term)):
            raise FencedError(f"{self._name} is past term {term}")
        return self._promoted(term)

    def _promoted(self, term: int) -> MemoryAddress | None:
        return None

    def alone(self, term: int) -> None:
        """Go on without the backup; not under the lock: an update may hold it and wait for us."""
        self._replication.alone(term)
        self._server.exclusively(lambda: None)  # wake who waits to be settled
