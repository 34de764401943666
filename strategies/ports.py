"""
The ports to servers: to those of the parameters, and to those of embedding tables.

`strategies/collective.py` has the port between workers, `strategies/worker_strategy.py` says what
ports are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.load import ShardLoad
from distplat.platform.shard_map import OwnLoop, TablePlan, TableSpec
from distplat.platform.task_scheduler import Lease, TaskPlan
from distplat.platform.tensor_slices import TensorEntry
from distplat.platform.vector_layout import Layout
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.checkpoint_types import Holding
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.sparse.routing import Routed
from distplat.strategies.sparse.table import RowGradients


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push, over all shards."""

    norm: float | None = None
    """2-norm of the summed gradient: `commit` must follow with it. None: the step is applied."""
    grad_norm: float | None = None
    """The same, whether the step is applied or not; None: nobody has computed it."""
    staleness: int = 0
    """Updates that came between this rank's pull and its push, on the shard with the most."""
    waiting_s: float = 0.0
    """How long servers held this rank up for others."""
    version: int = 0
    """Updates that the parameters have behind them, on the shard with the fewest."""
    loads: tuple[ShardLoad, ...] = ()
    """What it was to each shard."""
    dropped: int = 0
    """This rank's pushes so far that came too late for their step."""
    total: StepControl | None = None
    """The control records of all ranks, without `present`; None: of a push that was too late."""


class VectorSpec(NamedTuple):
    """What one vector of a shard is."""

    key: str
    """Of a checkpoint: `model`, or `optimizer/` and torch's name."""
    dtype: str
    length: int | None
    """None: a number for each parameter, by its index among all."""
    shape: tuple[int, ...] | None = None
    """Of a tensor that is of one parameter, whose slot ends the key; None: it is of all."""


@dataclass(frozen=True)
class ShardCopy:
    """What a shard has kept for a checkpoint."""

    steps: int
    """That the slowest rank has made at this shard."""
    start: int = 0
    """First element of the shard."""
    kinds: tuple[VectorSpec, ...] = ()
    ref: Any = None
    """Refers to the vectors, in the order of `kinds`; None: they are not here."""
    used: bytes = b""
    """A byte for each parameter, 0: the optimizer remembers nothing of it."""


@dataclass(frozen=True)
class TablesCopy:
    """What an embedding server has kept for a checkpoint."""

    steps: int
    """That the slowest rank has made at this server."""
    entries: tuple[TensorEntry, ...] = ()
    """What is in the arrays."""
    ref: Any = None
    """Refers to the arrays; None: they are not here."""


class Vectors(Protocol):
    """A worker's vectors, and what lies in them: a `FlatModel`, or what a train function sums."""

    params: Tensor
    """What servers give, shape [n]."""
    grads: Tensor
    """What is pushed, shape [n]."""
    version: int
    """Updates that `params` has had."""

    @property
    def size(self) -> int:
        """Elements of each vector."""

    @property
    def mixed(self) -> bool:
        """Whether they hold several types, and are bytes."""

    @property
    def layout(self) -> Layout:
        """Which parameter lies where in the vector."""

    def digest(self) -> str:
        """Fingerprint of what lies in them."""

    def move(self, params: Tensor, grads: Tensor) -> None:
        """Go on in other vectors; whoever hands them over has filled `params`."""


@dataclass(frozen=True)
class LoopOptimizer:
    """Of a train function: what servers make of its gradients, and what there is already."""

    own_loop: OwnLoop
    """What they make of them."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """What the optimizer remembers, see `FlatOptimizer.state`; rank 0's counts."""


class Shards(Protocol):
    """
    The server group as one worker sees it. Through it workers know servers, never each other.

    The worker's parameters and gradients live in buffers that the port gives out, so that where
    both sides share a node nothing is copied.
    """

    def connect(
        self, flat: FlatModel, saved: SavedState | None = None, holding: Holding | None = None
    ) -> None:
        """
        Agree on the shard map, move the model's flat buffers to where the servers can reach them,
        and take over the servers' parameters (rank 0's initial ones in a fresh run).

        Args:
            flat: the model; its `version` is that of its parameters.
            saved: the checkpoint that they are of, with the optimizer's state; None: of none.
            holding: what of the whole model it is; None: all of it.

        Raises:
            ProtocolError: this worker's model is not that of the others.
            ActorLost: a server is gone.
            DeadlineExceeded: somebody did not come.
        """

    def step_back(self, version: int) -> None:
        """
        Take the parameters of the version before the servers', where other parts of the model
        have not come further; the servers keep theirs, and take the step's gradients again.
        """

    def one_memory(self) -> bool:
        """
        Say whether `flat.params` is the memory that the servers update, after `connect`.

        Then it is also that of other workers, and what one of them writes there counts.
        """

    def push(self, step: int, control: StepControl, task: int | None = None) -> Pushed:
        """
        Hand the gradients to all shards, one call to each, and wait for their answers.

        Where tasks are leased, `step` counts this rank's pushes in the attempt, and `task` is what
        the gradient is of.

        Synchronous servers answer when every rank's gradients are there, asynchronous ones when
        this rank's are applied. Either way the new parameters are in place then, unless the answer
        has a `norm`.
        """

    def commit(self, step: int, norm: float) -> Pushed:
        """Have all shards apply the update of `step`; return with the new parameters in place."""

    def refresh(self) -> None:
        """Bring the newest parameters here."""

    def seen(self) -> NDArray[np.bool_]:
        """
        Say which parameters have had a gradient yet, on any rank.

        Returns:
            By slot of the flat vector.
        """

    def settings(self) -> tuple[float, ...]:
        """
        Give what came with the pushes of the last step that servers know of; empty: none did.

        Only where the learning rate goes by evaluations, see `PlateauState`.
        """

    def left_out(self) -> bool:
        """Say whether the last step that servers know of was left out, as one with NaN may be."""

    def average(self) -> Tensor:
        """
        Fetch the average of the parameters after the last update, shape [n], on their device.

        Only where the job has an `ema`, and between two steps: no rank begins the next one before
        all have what they want. Of asynchronous shards at any time, each by itself.
        """

    def copies(self, version: int) -> list[ShardCopy] | None:
        """
        Fetch what the shards have kept of a version, for a checkpoint; from any thread.

        Waits while ranks are still behind that version. None: it is not there any more.
        """


class LoopShards(Protocol):
    """The server group as one worker's train function sees it."""

    def connect_loop(self, vectors: Vectors, loop: LoopOptimizer) -> None:
        """
        See `Shards.connect`; what rank 0 has is what servers begin with.

        Args:
            vectors: are moved to where the servers reach them.
            loop: what is made of them; the same on all ranks, but for its state.

        Raises:
            as `Shards.connect`.
        """

    def push(self, step: int, control: StepControl) -> Pushed:
        """
        Hand `grads` to all shards, and wait for their answers; what they give is in `params` then.

        Args:
            step: number of this rank's push, from 0.
            control: what the others are to know of it.
        """

    def refresh(self) -> None:
        """See `Shards`."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Fetch what the servers' optimizer remembers, see `FlatOptimizer.state`."""

    def leave(self) -> int:
        """
        Push no more: this rank's train function is over, and nobody is to wait for it.

        Returns:
            How many ranks' functions go on. It may be asked again.
        """


class RunStore(Protocol):
    """Where the ranks of a run leave small things for each other, whenever they come."""

    def first(self, name: str, value: bytes) -> bytes:
        """Leave a value under a name, unless somebody has done so; give the one that is there."""


class Leases(Protocol):
    """The task scheduler as one worker sees it: what to do next, and what is done."""

    def connect(self, plan: TaskPlan) -> None:
        """
        Join the run's workers.

        Raises:
            ProtocolError: this worker's data set is not that of the others.
            ActorLost: the scheduler is gone.
        """

    def next(self, alive: Callable[[], None]) -> Lease:
        """
        Give what is to be done next; wait while there is nothing.

        Args:
            alive: called now and then in the wait.
        """

    def finish(self, tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()) -> None:
        """Tell what is done; returns at once."""


class PendingPush(Protocol):
    """A push to embedding tables under way."""

    def wait(self) -> None:
        """
        Return when every server has made the step.

        Raises:
            ActorLost: a server is gone.
            DeadlineExceeded: somebody did not come.
        """


class Tables(Protocol):
    """The servers of embedding tables as one worker sees them (docs/embeddings.md)."""

    def connect(
        self, tables: tuple[TableSpec, ...], total_steps: int, saved: SavedState | None = None
    ) -> tuple[TablePlan, int]:
        """
        Join an attempt: from now on the servers take nothing of an earlier one.

        Args:
            tables: the same on all ranks.
            total_steps: updates in the run; servers need it for the learning rate.
            saved: the checkpoint to begin from; servers that have tables already keep theirs.

        Returns:
            What the servers were told, and the steps that each of them has behind it at least.

        Raises:
            ProtocolError: this worker's tables are not those of the others.
            ActorLost: a server is gone.
            DeadlineExceeded: a server did not answer.
        """

    def begin(self, version: int) -> None:
        """
        Have the tables at the step that all go on from; before anything is pulled or pushed.

        Servers may have made one step more than is known of everybody, and take it back.

        Args:
            version: steps that the ranks have behind them; the same on all of them.

        Raises:
            ProtocolError: a server is at another step, and cannot come to this one.
        """

    def pull(self, table: int, ids: Routed, *, keep: bool) -> NDArray[np.float32]:
        """
        Give rows as the last step has left them, shape [n, width]; nothing is created.

        Args:
            table: its number.
            ids: which rows.
            keep: whether the memory stays as it is until the next push, else until the next pull.
        """

    def push(
        self,
        step: int,
        gradients: Sequence[tuple[Routed, RowGradients]],
        task: int | None = None,
        skip: bool = False,
    ) -> PendingPush:
        """
        Begin to hand gradients over, an entry for each table that was used; every rank, every step.

        What was pulled before is gone. The gradients must not change, and nothing may be pulled,
        before the handle is done. Then the gradients of all ranks are added in rank order and
        applied, once; asynchronous tables apply this rank's alone.

        Where tasks are leased, `step` counts this rank's pushes in the attempt, and `task` is what
        the gradients are of.

        One rank's `skip` leaves the step out on all servers; beside asynchronous tables, its own
        push. The step counts as made.
        """

    def copies(self, version: int) -> list[TablesCopy] | None:
        """
        Fetch what the servers have kept of a version, for a checkpoint; from any thread.

        Waits while ranks are still behind that version. None: it is not there any more.
        """
