"""
The store of a torch group: rank 0 serves it, all connect to it, and through it to each other.

    rank 0: open a port -> leave the address with Ray -> serve the store
    rank r: find the address ->  connect
    all:    "here/r" in the store -> wait until everybody is here -> gloo connects all to all
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import ray

from distplat.actors.collectives import compat
from distplat.actors.collectives.heartbeat import SILENT_S
from distplat.actors.collectives.rendezvous import (
    GIVEN_UP,
    Settings,
    find_word,
    leave_word,
    take_back_word,
    wait_for,
)
from distplat.platform.errors import CollectiveError, DeadlineExceeded

T = TypeVar("T")

_LINGER_S = 2 * SILENT_S
_PROBE_S = 1.0


class Store:
    """
    One rank's connection to the store of its group; rank 0 serves it.

    Args:
        group_name: of the group.
        rank: place in it.
        world: ranks in it.
        settings: the group's.

    Raises:
        DeadlineExceeded: somebody did not come in `rendezvous_s`.
        CollectiveError: this rank was told to give up, or rank 0 is gone.
    """

    def __init__(self, group_name: str, rank: int, world: int, settings: Settings) -> None:
        self._name, self._rank, self._world = group_name, rank, world
        self._settings = settings
        self._server: Any = None
        self.host = _address()
        """Address that this rank listens on."""
        try:
            host, port = self._serve() if rank == 0 else self._find()
            self.client = compat.connect_store(host, port, settings.rendezvous_s)
            self._wait_for_all()
        except (RuntimeError, OSError) as error:
            cause = f"no answer from rank 0: {str(error).splitlines()[0]}"
            raise CollectiveError(group_name, "rendezvous", 0, (0,), cause) from None
        finally:
            if rank == 0:
                take_back_word(group_name)

    def close(self, *, troubled: bool) -> None:
        """
        Serve no more.

        Args:
            troubled: the group broke; the others may still be asking whose fault it is.
        """
        if troubled and self._server is not None:
            later = threading.Timer(_LINGER_S, lambda server: None, [self._server])
            later.daemon = True
            later.start()
        self._server = None

    def _serve(self) -> tuple[str, int]:
        listener = socket.create_server((self.host, 0))
        host, port = listener.getsockname()[:2]
        self._server = compat.serve_store(listener.detach(), host, port)
        leave_word(self._name, f"{host} {port}".encode())
        return host, port

    def _find(self) -> tuple[str, int]:
        host, port = find_word(self._name, self._settings).decode().split()
        # Rank 0 listens before it says so: who is refused comes too late. The store's own client
        # would try again and again.
        with suppress(TimeoutError):
            socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
        return host, int(port)

    def _wait_for_all(self) -> None:
        """Be patient here: gloo itself would give the others one operation's time to come."""
        self.client.set(f"here/{self._rank}", "")
        everybody = [f"here/{rank}" for rank in range(self._world)]

        def complete() -> bytes | None:
            return b"" if self.client.check(everybody) else None

        def absent() -> tuple[int, ...]:
            return tuple(r for r in range(self._world) if not self.client.check([everybody[r]]))

        wait_for(complete, self._name, absent, self._settings)


def run_unless_given_up(make: Callable[[], T], group_name: str, settings: Settings) -> T:
    """
    Run what may take long in a thread, and wait for it only as long as it is wanted.

    A thread that is left behind ends at its own deadlines, or with the peer that holds it up.

    Raises:
        CollectiveError: this rank was told to give up.
        DeadlineExceeded: rank 0, which serves the store, does not answer.
        Exception: what `make` raised.
    """
    made: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            made.append(make())
        except BaseException as error:  # to be raised where it is waited for
            raised.append(error)

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    limit = settings.rendezvous_s + settings.operation_s
    if not _join(thread, limit, settings.abandoned):
        if settings.abandoned.is_set():
            raise CollectiveError(group_name, "rendezvous", 0, (), GIVEN_UP)
        what = f"rendezvous of group {group_name!r}"
        raise DeadlineExceeded(what, ("worker-0",), limit, "failure.start_timeout_s")
    if raised:
        raise raised.pop()
    return made.pop()


def _join(thread: threading.Thread, limit_s: float, gave_up: threading.Event) -> bool:
    """Say whether the thread ended in time."""
    rest = limit_s
    while thread.is_alive() and rest > 0 and not gave_up.is_set():
        thread.join(0.1)
        rest -= 0.1
    thread.join(0.1)  # it looks at the event itself, and has the better error
    return not thread.is_alive()


def _address() -> str:
    """Address to listen on: loopback where the cluster is one node, else this node's own."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return "127.0.0.1" if len(alive) == 1 else str(ray.util.get_node_ip_address())
