"""
A server node's part in a shard that is kept twice: as primary it sends, as backup it follows.

The manager says who is what, and `platform/server_group.py` refuses what comes from an earlier
time. Gradients go to a backup on the same node through shared memory, to another
node as bytes in the call.
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

from distplat.actors.memory.memfd import Segment
from distplat.actors.messages import Address
from distplat.actors.servers.vector_transport import from_bytes
from distplat.actors.transport import ActorDied, Transport, Unanswered
from distplat.platform.errors import DeadlineExceeded, FencedError, GapError, NotReadyError
from distplat.platform.server_group import Held, Part, Role
from distplat.platform.shard_map import Shard
from distplat.strategies.training.mirror import Mirrored, Twin, Update, become, twin_of

_SLICE_S = 0.05
"""How often who waits for a backup looks whether it is still to wait."""


@dataclass
class Backup:
    """The other server, as a primary sees it."""

    name: str
    handle: Any
    near: Segment | None
    """Gradients are laid here; None: it is on another node, or in another container."""


class Replication:
    """
    See the top of the file; it is the shard's `Mirror`.

    Args:
        name: of this server.
        transport: its way to other servers.
        role: its first part.
        shard: what is kept twice.
        limit_s: how long a backup may take.
    """

    def __init__(
        self, name: str, transport: Transport, role: Role, shard: Mirrored, limit_s: float
    ) -> None:
        self._name, self._transport = name, transport
        self._shard, self._limit_s = shard, limit_s
        self.part = Part(role)
        self._changing = threading.Lock()
        self._backup: Backup | None = None
        self._inbox: Tensor | None = None  #: as a backup: where the primary lays gradients
        self._sent: tuple[Callable[[], Any], Any] | None = None  #: the call under way, to repeat it

    @property
    def settled(self) -> bool:
        """See `Mirror`."""
        return self.part.settled

    def held(self, number: int, cut: Shard) -> Held:
        """Say what this server keeps, and as what."""
        backup = self._backup.name if self._backup is not None else None
        return Held(self._name, number, self.part.role, self.part.term, backup, cut)

    def send(self, update: Update, gradient: Tensor) -> None:
        """See `Mirror`."""
        backup, term = self._backup, self.part.term
        if self.part.role is not Role.MIRRORED or backup is None:
            return
        values = None
        if backup.near is not None:
            backup.near.tensor.copy_(gradient)
        else:
            values = gradient.detach().clone().view(torch.uint8).numpy()

        def call() -> Any:
            return self._transport.call(backup.handle, "update", term, update, values)

        self._sent = call, call()

    def confirm(self) -> None:
        """See `Mirror`."""
        until = time.monotonic() + self._limit_s
        while self._sent is not None and self.part.role is Role.MIRRORED:
            call, answer = self._sent
            if self._made(call, answer):
                break
            if time.monotonic() > until:
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
            changed = self.part.change(Role.ALONE, term)
            if changed:
                self._backup = None
            return changed or self.part.term == term

    def mirror_to(self, term: int, name: str, handle: Any, opened: bool) -> None:
        """
        Fill a backup, and send it every update from now on; the shard's lock is held.

        Args:
            term: of the pair.
            name: the backup's.
            handle: the backup.
            opened: whether the shard holds parameters.

        Raises:
            NotReadyError: there is nothing to fill it with yet.
            FencedError: this server is not in this term.
        """
        if not opened:
            raise NotReadyError(f"{self._name} has no parameters yet")
        if self.part.role is Role.MIRRORED and self.part.term == term:
            return
        if self.part.role is Role.BACKUP or self.part.term >= term:
            raise FencedError(f"{self._name} is in term {self.part.term}, not before {term}")
        twin = twin_of(self._shard)
        elements, dtype = twin.vectors[0][0].numel(), str(twin.vectors[0][0].dtype)[6:]
        inbox = Segment.create(self._transport.node, elements, dtype)
        call = self._transport.call(handle, "take_over", term, twin, inbox.address)
        until = time.monotonic() + self._limit_s
        while not self._transport.wait([call], _SLICE_S):
            if self.part.term >= term or time.monotonic() > until:
                raise FencedError(f"{name} was given up before it was filled")
        near = self._transport.get(call, self._limit_s)
        inbox.seal()
        with self._changing:
            if self.part.change(Role.MIRRORED, term):
                self._backup = Backup(name, handle, inbox if near else None)

    def take_over(self, term: int, twin: Twin, inbox: Address) -> bool:
        """
        As a backup: become what the primary is; the shard's lock is held.

        Returns:
            Whether the primary's memory was reached: it lays gradients there.

        Raises:
            FencedError: this server is not in this term.
        """
        if not self.part.change(Role.BACKUP, term):
            self.part.check_update(term)  # the same call once more, or one that came too late
            return self._inbox is not None
        become(self._shard, twin)
        if inbox.node == self._transport.node:
            try:
                self._inbox = Segment.open(inbox).tensor
            except OSError:
                self._inbox = None
        return self._inbox is not None

    def follow(
        self, term: int, update: Update, version: int, values: NDArray[np.uint8] | None
    ) -> None:
        """
        As a backup: make an update, once; the shard's lock is held.

        Args:
            term: of the primary.
            update: what to make.
            version: of this shard.
            values: the gradient's bytes; None: they are in the inbox.

        Raises:
            FencedError: from a server that is the primary no more.
            GapError: an update before it is missing.
        """
        self.part.check_update(term)
        if update.version < version:
            return
        if update.version > version:
            raise GapError(f"update {update.version} refused: {self._name} is at {version}")
        if values is not None:
            gradient = from_bytes(values, self._shard.params.dtype)
        else:
            assert self._inbox is not None, "the primary was told that it is not reached"
            gradient = self._inbox
        self._shard.follow(update, gradient)
