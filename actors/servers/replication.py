"""
A server node's part in a store that is kept twice: as primary it sends, as backup it follows.

The manager says who is what, and `platform/server_group.py` refuses what comes from an earlier
time. What is sent is numbered in each term, so that what arrives twice is done
once. A shard's gradients go to a backup on the same node through shared memory, to another node as
bytes in the call; rows of embedding tables, of which there may be any number, always in the call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import MemoryAddress
from distplat.actors.servers.vector_transport import from_bytes
from distplat.actors.transport import ActorDied, Transport, Unanswered
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import DeadlineExceeded, FencedError, GapError, NotReadyError
from distplat.platform.server_group import ReplicaState, Role, ServerReport
from distplat.platform.shard_map import Shard
from distplat.strategies.server.store import BackupLink, Change, ReplicatedStore, StoreSnapshot

_SLICE_S = 0.05
"""How often who waits for a backup looks whether it is still to wait."""


@dataclass
class Backup:
    """The other server, as a primary sees it."""

    name: str
    handle: Any
    inbox_memory: MemorySegment | None
    """Gradients are laid here; None: it is on another node, or in another container."""


class Replication(BackupLink):
    """
    One server's side of a pair that keeps a store twice; it is the store's `BackupLink`.

    Args:
        name: of this server.
        transport: its way to other servers.
        role: its first part.
        store: what is kept twice.
        limit_s: how long a backup may take.
    """

    def __init__(
        self, name: str, transport: Transport, role: Role, store: ReplicatedStore, limit_s: float
    ) -> None:
        self._name, self._transport = name, transport
        self._store, self._limit_s = store, limit_s
        self.state = ReplicaState(role)
        self._changing = threading.Lock()
        self._backup: Backup | None = None
        self._inbox: Tensor | None = None  #: as a backup: where the primary lays gradients
        self._count = 0  #: in this term: what was sent, or followed
        self._sent: tuple[Callable[[], Any], Any] | None = None  #: the call under way, to repeat it

    @property
    @override
    def settled(self) -> bool:
        return self.state.settled

    def held(self, number: int, cut: Shard | None = None) -> ServerReport:
        """Say what this server keeps, and as what."""
        backup = self._backup.name if self._backup is not None else None
        return ServerReport(self._name, number, self.state.role, self.state.term, backup, cut)

    @override
    def send(self, change: Change, gradient: Any = None) -> None:
        backup, term, number = self._backup, self.state.term, self._count
        if self.state.role is not Role.PRIMARY or backup is None:
            return
        self._count += 1
        sent = gradient
        if backup.inbox_memory is not None:
            backup.inbox_memory.tensor.copy_(gradient)
            sent = None
        elif isinstance(gradient, Tensor):
            sent = gradient.detach().clone().view(torch.uint8).numpy()

        def call() -> Any:
            return self._transport.call(backup.handle, "update", term, number, change, sent)

        self._sent = call, call()

    @override
    def confirm(self) -> None:
        clock = AwakeClock()
        while self._sent is not None and self.state.role is Role.PRIMARY:
            call, answer = self._sent
            if self._made(call, answer):
                break
            if clock.now() > self._limit_s:
                missing = (self._backup.name,) if self._backup is not None else ()
                what = f"an update of {self._name}"
                raise DeadlineExceeded(what, missing, self._limit_s, "failure.step_timeout_s")
        self._sent = None

    def _made(self, call: Callable[[], Any], answer: Any) -> bool:
        """Look a moment whether the backup has made the update."""
        if not self._transport.wait([answer], _SLICE_S):
            return False
        try:
            self._transport.get(answer, self._limit_s)
        except Unanswered:
            self._sent = call, call()  # it may have made it: then it says so again
            return False
        except ActorDied:
            time.sleep(_SLICE_S)  # it died; only the manager says whether we go on alone
            return False
        return True

    def alone(self, term: int) -> bool:
        """Take the manager's word that there is no backup, or that this server is the primary."""
        with self._changing:
            changed = self.state.change(Role.ALONE, term)
            if changed:
                self._backup = None
            return changed or self.state.term == term

    def replicate_to(self, term: int, name: str, handle: Any, opened: bool) -> None:
        """
        Fill a backup, and send it every update from now on; the store's lock is held.

        Args:
            term: of the pair.
            name: the backup's.
            handle: the backup.
            opened: whether the store holds values.

        Raises:
            NotReadyError: there is nothing to fill it with yet.
            FencedError: this server is not in this term.
        """
        if not opened:
            raise NotReadyError(f"{self._name} has no parameters yet")
        if self.state.role is Role.PRIMARY and self.state.term == term:
            return
        if self.state.role is Role.BACKUP or self.state.term >= term:
            raise FencedError(f"{self._name} is in term {self.state.term}, not before {term}")
        snapshot, like, inbox = self._store.snapshot(), self._store.inbox, None
        if like is not None:
            inbox = MemorySegment.create(self._transport.node, like.numel(), str(like.dtype)[6:])
        address = inbox.address if inbox is not None else None
        call = self._transport.call(handle, "take_over", term, snapshot, address)
        clock = AwakeClock()
        while not self._transport.wait([call], _SLICE_S):
            if self.state.term >= term or clock.now() > self._limit_s:
                raise FencedError(f"{name} was given up before it was filled")
        inbox_memory = self._transport.get(call, self._limit_s)
        if inbox is not None:
            inbox.seal()
        with self._changing:
            if self.state.change(Role.PRIMARY, term):
                self._count = 0
                self._backup = Backup(name, handle, inbox if inbox_memory else None)

    def take_over(self, term: int, snapshot: StoreSnapshot, inbox: MemoryAddress | None) -> bool:
        """
        As a backup: become what the primary is; the store's lock is held.

        Returns:
            Whether the primary's memory was reached: it lays gradients there.

        Raises:
            FencedError: this server is not in this term.
        """
        if not self.state.change(Role.BACKUP, term):
            self.state.check_update(term)  # the same call once more, or one that came too late
            return self._inbox is not None
        self._store.load_snapshot(snapshot)
        self._count, self._inbox = 0, None
        if inbox is not None and inbox.node == self._transport.node:
            try:
                self._inbox = MemorySegment.open(inbox).tensor
            except OSError:
                self._inbox = None
        return self._inbox is not None

    def follow(
        self, term: int, number: int, change: Change, sent: NDArray[np.uint8] | Any | None
    ) -> None:
        """
        As a backup: do what the primary does, once; the store's lock is held.

        Args:
            term: of the primary.
            number: of what it has sent in this term.
            change: what to do.
            sent: the gradient, a vector's as bytes; None: it is in the inbox, or there is none.

        Raises:
            FencedError: from a server that is the primary no more.
            GapError: something before it is missing.
        """
        self.state.check_update(term)
        if number < self._count:
            return
        if number > self._count:
            raise GapError(f"update {number} refused: {self._name} is at {self._count}")
        like, gradient = self._store.inbox, sent
        if like is not None:
            gradient = self._inbox if sent is None else from_bytes(sent, like.dtype)
            assert gradient is not None, "the primary was told that it is not reached"
        self._store.follow(change, gradient)
        self._count += 1
