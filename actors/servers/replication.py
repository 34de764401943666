"""
A server node's side of replication: a primary sends its updates, a backup applies them.

The manager assigns the roles, and `platform/server_group.py` refuses messages of earlier terms.
Updates are numbered within a term, so that an update that arrives twice is applied once. A shard's
gradients go to a backup on the same node through shared memory, to another node as bytes in the
call. Rows of embedding tables vary in number and always go in the call.
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
"""Period at which a wait for a backup checks whether to continue."""


@dataclass
class Backup:
    """A primary's backup."""

    name: str
    handle: Any
    inbox_memory: MemorySegment | None
    """Memory for gradients; None: the backup is on another node, or in another container."""


class Replication(BackupLink):
    """
    One server's side of a primary and its backup; the store's `BackupLink`.

    Args:
        name: of this server.
        transport: for calls to other servers.
        role: initial role.
        store: the replicated store.
        limit_s: deadline of a backup's answer.
    """

    def __init__(
        self, name: str, transport: Transport, role: Role, store: ReplicatedStore, limit_s: float
    ) -> None:
        self._name, self._transport = name, transport
        self._store, self._limit_s = store, limit_s
        self.state = ReplicaState(role)
        self._changing = threading.Lock()
        self._backup: Backup | None = None
        self._inbox: Tensor | None = None  #: of a backup: memory into which the primary writes
        self._count = 0  #: updates sent or applied in this term
        self._sent: tuple[Callable[[], Any], Any] | None = None  #: open call: to repeat it, reply

    @property
    @override
    def settled(self) -> bool:
        return self.state.settled

    def held(self, number: int, cut: Shard | None = None) -> ServerReport:
        """Return the shard, role, term and backup of this server."""
        backup = self._backup.name if self._backup is not None else None
        return ServerReport(self._name, number, self.state.role, self.state.term, backup, cut)

    @override
    def send(self, change: Change, gradient: Any = None) -> None:
        backup, term, number = self._backup, self.state.term, self._count
        if self.state.role is not Role.PRIMARY or backup is None:
            return
        self._count += 1
        payload = gradient
        if backup.inbox_memory is not None:
            backup.inbox_memory.tensor.copy_(gradient)
            payload = None
        elif isinstance(gradient, Tensor):
            payload = gradient.detach().clone().view(torch.uint8).numpy()

        def call() -> Any:
            return self._transport.call(backup.handle, "update", term, number, change, payload)

        self._sent = call, call()

    @override
    def confirm(self) -> None:
        clock = AwakeClock()
        while self._sent is not None and self.state.role is Role.PRIMARY:
            call, reply = self._sent
            if self._is_acknowledged(call, reply):
                break
            if clock.now() > self._limit_s:
                missing = (self._backup.name,) if self._backup is not None else ()
                what = f"an update of {self._name}"
                raise DeadlineExceeded(what, missing, self._limit_s, "failure.step_timeout_s")
        self._sent = None

    def _is_acknowledged(self, call: Callable[[], Any], reply: Any) -> bool:
        """Wait up to `_SLICE_S`; return whether the backup has applied the update."""
        if not self._transport.wait([reply], _SLICE_S):
            return False
        try:
            self._transport.get(reply, self._limit_s)
        except Unanswered:
            self._sent = call, call()  # the backup may have applied it; it answers again
            return False
        except ActorDied:
            time.sleep(_SLICE_S)  # the backup died; the manager will call `alone`
            return False
        return True

    def alone(self, term: int) -> bool:
        """Continue without a backup, by the manager's order; return whether `term` is current."""
        with self._changing:
            changed = self.state.change(Role.ALONE, term)
            if changed:
                self._backup = None
            return changed or self.state.term == term

    def replicate_to(self, term: int, name: str, handle: Any, opened: bool) -> None:
        """
        Copy the store to a backup and start to send it updates; the store's lock is held.

        Args:
            term: of the primary and its backup.
            name: of the backup.
            handle: of the backup.
            opened: whether the store holds values.

        Raises:
            NotReadyError: the store holds no values yet.
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
        Become a backup and load the primary's snapshot; the store's lock is held.

        Returns:
            Whether the primary's memory was mapped: gradients are then written there.

        Raises:
            FencedError: this server is not in this term.
        """
        if not self.state.change(Role.BACKUP, term):
            self.state.check_update(term)  # a repeated call is answered, a late one refused
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
        self, term: int, number: int, change: Change, payload: NDArray[np.uint8] | Any | None
    ) -> None:
        """
        Apply an update of the primary, once; the store's lock is held.

        Args:
            term: of the primary.
            number: of the update in this term.
            change: the update.
            payload: gradient, a vector's as bytes; None: it is in the inbox, or there is none.

        Raises:
            FencedError: the sender is not the primary any more.
            GapError: an earlier update is missing.
        """
        self.state.check_update(term)
        if number < self._count:
            return
        if number > self._count:
            raise GapError(f"update {number} refused: {self._name} is at {self._count}")
        like, gradient = self._store.inbox, payload
        if like is not None:
            gradient = self._inbox if payload is None else from_bytes(payload, like.dtype)
            assert gradient is not None, "without an inbox the primary sends bytes"
        self._store.follow(change, gradient)
        self._count += 1
