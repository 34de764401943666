"""
What a server asks of its store, and how a store is kept twice.

    primary    sum, clip ── Update, the gradient ──▶ backup     the same update of the same bits
               update                                update
               wait for its word ◀──────────────────
               answer the workers

What travels is the gradient as the optimizer takes it, not the state that comes of it: one vector
of a shard, or the rows of a step, whatever the optimizer remembers and however many workers there
are. Same gradient, same state, same arithmetic: the two stay equal to the bit.
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
"""That copies are kept of."""


@dataclass(frozen=True)
class Update:
    """One update of a store, without its gradient."""

    version: int
    """Updates that the store has behind it before this one."""
    push: PushId | None = None
    """Asynchronous: whose gradient it is; None: the sum of all ranks'."""
    pulls: tuple[int, ...] = ()
    """Asynchronous shards: ranks that took the values of this version, in order."""
    pulled: int = 0
    """Asynchronous shards: the version at which the gradient was computed."""
    present: bytes | None = None
    """A byte for each parameter of the model, 1: it has a gradient; None: all have."""
    settings: tuple[float, ...] = ()
    """What came with the pushes that it is of."""
    applied: bool = True
    """Of a shard: the step is not left out, so that an average of the parameters moves, too."""


@dataclass(frozen=True)
class Renewal:
    """An attempt that embedding tables have begun: how many ranks make a step may be another."""

    plan: TablePlan


@dataclass(frozen=True)
class StepBack:
    """A step of embedding tables that is taken back."""

    version: int
    """Steps that they have behind them afterwards."""


Change = Update | Renewal | StepBack
"""What a backup does after its primary."""


class BackupLink(Protocol):
    """The way from a primary to its backup. Both calls are made with the server's lock held."""

    @property
    def settled(self) -> bool:
        """Whether it is known if there is a backup: nothing is served before."""

    def send(self, change: Change, gradient: Any = None) -> None:
        """
        Have the backup do what the primary does; returns before it is done.

        Args:
            change: what.
            gradient: of an update: the vector, or the rows of each table.
        """

    def confirm(self) -> None:
        """
        Return when the backup has done what was sent, or is none any more.

        Raises:
            DistplatError: this server may not acknowledge the update, nor any other.
        """


@dataclass(frozen=True)
class StoreSnapshot:
    """A copy of all that a store is made of."""

    vectors: Mapping[str, Any]
    """Large things by name: tensors, or all that a table holds."""
    attributes: Mapping[str, Any]
    """Plain values by name."""


class ReplicatedStore(Protocol):
    """A store that can be kept twice."""

    backup_link: BackupLink | None
    """The way to a backup."""

    @property
    def inbox(self) -> Tensor | None:
        """
        Give a vector like the gradients that travel to a backup, which are laid in memory that
        both servers share, where there is some; None: they are of any size, and go in the call.
        """

    def snapshot(self) -> StoreSnapshot:
        """Copy it; the server's lock is held."""

    def load_snapshot(self, snapshot: StoreSnapshot) -> None:
        """Take over the state of a copy of another store; the copy is used up."""

    def follow(self, change: Change, gradient: Any) -> None:
        """As a backup, do what the primary does."""


class ServerStore(ReplicatedStore, Protocol):
    """What a server keeps; it waits for nobody, and is called with the server's lock held."""

    squared_norm: float | None
    """Of what is staged, where somebody needs it."""

    @property
    def ledger(self) -> Ledger:
        """Which pushes are in it."""

    @property
    def opened(self) -> bool:
        """Whether it has values."""

    @property
    def present(self) -> Any:
        """Give the present values, as they are delivered."""

    @property
    def commits_alone(self) -> bool:
        """Whether a complete step may be applied at once: nothing of other servers is needed."""

    def push(self, push: PushId, gradient: Any, control: Any) -> Verdict:
        """
        Stage a gradient.

        Raises:
            ProtocolError: see `Ledger.offer`; nothing is changed.
        """

    def commit(self, seq: int, norm: float | None) -> bool:
        """
        Apply what is staged; False: it was applied before, nothing is done.

        Args:
            seq: of the push that completed it.
            norm: 2-norm of the gradient over all servers; only looked at where the job clips.

        Raises:
            ProtocolError: see `Ledger.commit`; nothing is changed.
        """

    def pull(self, rank: int) -> int:
        """Note that a worker takes the present values; give their version."""

    def head(self, control: Any) -> tuple[float, ...]:
        """Give the head of the control record of the update that a push became part of."""

    def staleness_of(self, rank: int) -> int:
        """Give the updates between a rank's pull and its last gradient's turn."""

    def renew(self, attempt: int, world: int | None) -> None:
        """Begin a new attempt; what is staged is forgotten."""

    def take_copies(self, version: int) -> Any:
        """Hand over the copies for a checkpoint; None: they are not there, or not any more."""

    def worker(self, part_rank: int) -> str:
        """Name one of the workers."""

    def log(self) -> NDArray[np.int64] | None:
        """Give the order of updates, shape [updates, 3]; None: it follows from the job."""


T = TypeVar("T")


class CheckpointCopies(Generic[T]):
    """
    Copies a server's state when a checkpoint is due; holds the copies of the two newest versions.

        version   119       120                121   ...   140               ...   160
        params    changes   changes | copied   changes     changes | copied        120's are gone
                                      |
                                      `- fetched while the training goes on

    All servers copy at the same version, whoever asks when; so the parts fit together (I3).

    Two, for a synchronous rank waits for the copies of one checkpoint to leave when the next is
    due: by then the server has copied again.

    Args:
        every: steps between two checkpoints; 0: there are none.
        total_steps: of the run.
    """

    def __init__(self, every: int, total_steps: int) -> None:
        self._every, self._total = every, total_steps
        self._kept: dict[int, T] = {}  #: by version, the oldest first

    def copy_if_due(self, version: int, copy: Callable[[], T]) -> None:
        """Keep what `copy` gives if a checkpoint of this version is due."""
        if version > max(self._kept, default=-1) and is_due(version, self._every, self._total):
            self._kept[version] = copy()
            while len(self._kept) > _VERSIONS:
                del self._kept[min(self._kept)]

    def take(self, version: int, present: int, copy: Callable[[], T]) -> T | None:
        """
        Give the copies of a version, and forget them; None: they are not here.

        A version of which none is due is copied now, if it is the `present` one: the run stops
        there.
        """
        if version == present and not is_due(version, self._every, self._total):
            return copy()
        return self._kept.pop(version, None)
