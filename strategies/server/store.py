"""
Protocols between a server and its store, and primary-backup replication of a store.

    primary    sum, clip ── Update, gradient ──▶ backup     the same update of the same bits
               update                            update
               wait for the ack ◀────────────────
               answer the workers

The primary sends the gradient that its optimizer applies, not the resulting state: one vector of a
shard, or the rows of a step, whatever the optimizer and the number of workers. The backup has the
same state and does the same arithmetic, so both stay bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.checkpoints import is_due
from distplat.platform.ledger import Ledger, PushId, Verdict
from distplat.platform.shard_map import TablePlan

_VERSIONS = 2
"""Versions whose checkpoint copies are kept."""


@dataclass(frozen=True)
class Update:
    """One update of a store, without its gradient."""

    version: int
    """Updates that the store applied before this one."""
    push: PushId | None = None
    """Asynchronous: the push that is applied; None: the sum of all ranks' gradients."""
    pulls: tuple[int, ...] = ()
    """Asynchronous shards: ranks that pulled this version, in order."""
    pulled: int = 0
    """Asynchronous shards: the version that the gradient was computed on."""
    present: bytes | None = None
    """A byte for each parameter of the model, 1: the parameter has a gradient; None: all have."""
    settings: tuple[float, ...] = ()
    """Settings sent with its pushes."""
    applied: bool = True
    """Shards: False if the step is skipped, so that an average of the parameters stays, too."""
    total: tuple[float, ...] = ()
    """Synchronous shards: head of the step's summed control record, for repeated pushes."""
    squared_norm: float | None = None
    """Synchronous shards: squared norm of the gradient before clipping; None: not needed."""


@dataclass(frozen=True)
class Renewal:
    """A new attempt of embedding tables, possibly with another number of ranks."""

    plan: TablePlan


@dataclass(frozen=True)
class StepBack:
    """The rollback of one step of embedding tables."""

    version: int
    """Completed steps after the rollback."""


Change = Update | Renewal | StepBack
"""A change that a backup repeats after its primary."""


class BackupLink(Protocol):
    """Link from a primary to its backup. Both methods are called with the server's lock held."""

    @property
    def settled(self) -> bool:
        """Whether it is decided if there is a backup; the primary serves nothing before."""

    def send(self, change: Change, gradient: Any = None) -> None:
        """
        Send a change to the backup, without waiting until the backup has applied it.

        Args:
            change: the change that the primary applies.
            gradient: of an update: the vector, or the rows of each table.
        """

    def confirm(self) -> None:
        """
        Wait until the backup has applied all changes sent, or is no longer the backup.

        Raises:
            DistplatError: this server must not acknowledge this update or any other.
        """


@dataclass(frozen=True)
class StoreSnapshot:
    """A copy of a store's whole state."""

    vectors: Mapping[str, Any]
    """Tensors or table contents by name."""
    attributes: Mapping[str, Any]
    """Plain values by name."""


class ReplicatedStore(Protocol):
    """A store that can have a backup."""

    backup_link: BackupLink | None
    """Link to the backup; None: there is none."""

    @property
    def inbox(self) -> Tensor | None:
        """
        Return a vector with shape and dtype of the gradients sent to a backup, which go through
        shared memory where both servers can map it; None: their sizes vary, and they go in the
        call.
        """

    def snapshot(self) -> StoreSnapshot:
        """Copy the state without staged gradients, which are pushed again; the lock is held."""

    def load_snapshot(self, snapshot: StoreSnapshot) -> None:
        """Load the state of another store; its tensors may be reused."""

    def follow(self, change: Change, gradient: Any) -> None:
        """Apply a change of the primary, on the backup."""


class ServerStore(ReplicatedStore, Protocol):
    """State behind a server; never blocks, and is called with the server's lock held."""

    squared_norm: float | None
    """Squared norm of the staged gradient, where clipping needs it."""

    @property
    def ledger(self) -> Ledger:
        """Ledger of the applied pushes."""

    @property
    def opened(self) -> bool:
        """Whether the store has values."""

    @property
    def present(self) -> Any:
        """Return the current values, as they are delivered."""

    @property
    def commits_alone(self) -> bool:
        """Whether a complete step can be applied at once, without the norms of other servers."""

    def push(self, push: PushId, gradient: Any, control: Any) -> Verdict:
        """
        Stage a gradient.

        Raises:
            ProtocolError: see `Ledger.offer`; the store is unchanged.
        """

    def commit(self, seq: int, norm: float | None) -> bool:
        """
        Apply the staged gradient; return False if it was already applied.

        Args:
            seq: sequence number of the push that completed the step.
            norm: 2-norm of the gradient over all servers; used only if the job clips.

        Raises:
            ProtocolError: see `Ledger.commit`; the store is unchanged.
        """

    def pull(self, rank: int) -> int:
        """Record that a worker pulls the current values; return their version."""

    def head(self, control: Any) -> tuple[float, ...]:
        """Return the head of the control record of the update that a push is part of."""

    def staleness_of(self, rank: int) -> int:
        """Return the staleness of a rank's last gradient: updates between its pull and its use."""

    def renew(self, attempt: int, world: int | None) -> None:
        """Start a new attempt and discard the staged gradients."""

    def take_copies(self, version: int) -> Any:
        """Return and drop the checkpoint copies of a version; None: there are none."""

    def worker(self, part_rank: int) -> str:
        """Return the name of a worker."""

    def log(self) -> NDArray[np.int64] | None:
        """Return the order of updates, shape [updates, 3]; None: it follows from the job."""


T = TypeVar("T")


class CheckpointCopies(Generic[T]):
    """
    Copies a server's state when a checkpoint is due; holds the copies of the two newest versions.

        version   119       120                121   ...   140               ...   160
        params    changes   changes | copied   changes     changes | copied        120 is dropped
                                      |
                                      `- fetched while training continues

    All servers copy at the same version, so the parts of a checkpoint fit together (I3).

    Two versions are held because a synchronous rank waits for the upload of one checkpoint only
    when the next is due, and by then the server has copied again.

    Args:
        every: steps between two checkpoints; 0: no checkpoints.
        total_steps: of the run.
    """

    def __init__(self, every: int, total_steps: int) -> None:
        self._every, self._total = every, total_steps
        self._copies: dict[int, T] = {}  #: by version, the oldest first

    def copy_if_due(self, version: int, copy: Callable[[], T]) -> None:
        """Store the result of `copy` if a checkpoint of this version is due."""
        if version > max(self._copies, default=-1) and is_due(version, self._every, self._total):
            self._copies[version] = copy()
            while len(self._copies) > _VERSIONS:
                del self._copies[min(self._copies)]

    def take(self, version: int, current: int, copy: Callable[[], T]) -> T | None:
        """
        Return and drop the copies of a version; None: there are none.

        If no checkpoint of the version is due and it is the `current` one, the run stops there:
        the state is copied now.
        """
        if version == current and not is_due(version, self._every, self._total):
            return copy()
        return self._copies.pop(version, None)
