"""
The ports to parameter servers, embedding servers, the task scheduler and the run's store.

The port between workers is in `strategies/collective.py`. `strategies/worker_strategy.py` describes
the ports.
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
    """The result of a push, over all shards."""

    norm: float | None = None
    """
    2-norm of the summed gradient, with which `commit` must follow; None: the update is already
    applied.
    """
    grad_norm: float | None = None
    """The same norm, whether or not the update is applied; None: the norm was not computed."""
    staleness: int = 0
    """Updates between this rank's pull and its push, on the shard with the most."""
    waiting_s: float = 0.0
    """Time for which servers blocked this rank to wait for others."""
    version: int = 0
    """Updates applied to the parameters, on the shard with the fewest."""
    loads: tuple[ShardLoad, ...] = ()
    """Load statistics of each shard."""
    dropped: int = 0
    """This rank's pushes so far that arrived too late for their step."""
    total: StepControl | None = None
    """The sum of all ranks' control records, without `present`; None: the push was too late."""


class VectorSpec(NamedTuple):
    """Name, dtype and shape of one vector of a shard."""

    key: str
    """Key in a checkpoint: `model`, or `optimizer/` and torch's name of the state."""
    dtype: str
    length: int | None
    """None: one number for each parameter of the model, by parameter index."""
    shape: tuple[int, ...] | None = None
    """
    Shape of a state tensor of a single parameter, whose slot is the end of the key; None: the
    vector covers all parameters.
    """


@dataclass(frozen=True)
class ShardCopy:
    """A shard's copy of its state for a checkpoint."""

    steps: int
    """Steps completed by the slowest rank at this shard."""
    start: int = 0
    """First element of the shard."""
    specs: tuple[VectorSpec, ...] = ()
    """Descriptions of the shard's vectors."""
    ref: Any = None
    """Reference to the vectors, in the order of `specs`; None: not available."""
    used: bytes = b""
    """One byte per parameter; 0: the optimizer has no state of the parameter."""


@dataclass(frozen=True)
class TablesCopy:
    """An embedding server's copy of its tables for a checkpoint."""

    steps: int
    """Steps completed by the slowest rank at this server."""
    entries: tuple[TensorEntry, ...] = ()
    """The contents of the arrays."""
    ref: Any = None
    """Reference to the arrays; None: not available."""


class Vectors(Protocol):
    """
    A worker's flat vectors and their layout: a `FlatModel`, or the summed gradients of a train
    function.
    """

    params: Tensor
    """Values received from the servers, shape [n]."""
    grads: Tensor
    """Values to push, shape [n]."""
    version: int
    """Updates applied to `params`."""

    @property
    def size(self) -> int:
        """Number of elements of each vector."""

    @property
    def mixed(self) -> bool:
        """Whether the vectors have several dtypes and are stored as bytes."""

    @property
    def layout(self) -> Layout:
        """The position of each parameter in the vector."""

    def digest(self) -> str:
        """Return a fingerprint of the layout."""

    def move(self, params: Tensor, grads: Tensor) -> None:
        """Use other vectors from now on; the caller has already filled `params`."""


@dataclass(frozen=True)
class LoopOptimizer:
    """The servers' optimizer for a train function, and its initial state."""

    own_loop: OwnLoop
    """How the servers process gradients."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """State of the optimizer, see `FlatOptimizer.state`; only rank 0's is used."""


class Shards(Protocol):
    """
    The server group, as seen by one worker. Workers exchange parameters and gradients only through
    it.

    The worker's parameters and gradients are in buffers that this port allocates, so that nothing
    is copied between a worker and a server on the same node.
    """

    def connect(
        self, flat: FlatModel, saved: SavedState | None = None, holding: Holding | None = None
    ) -> None:
        """
        Agree on the shard map, move the model's flat buffers to memory that the servers can access,
        and load the servers' parameters (in a new run, rank 0's initial ones).

        Args:
            flat: the model; `version` is the version of its parameters.
            saved: the checkpoint that the parameters were loaded from, with the optimizer's state;
                None: no checkpoint.
            holding: the part of the whole model that `flat` is; None: all of it.

        Raises:
            ProtocolError: This worker's model differs from the other workers' model.
            ActorLost: A server is lost.
            DeadlineExceeded: A worker or server did not connect in time.
        """

    def step_back(self, version: int) -> None:
        """
        Load the parameters of the version before the servers' current one.

        Used if other parts of the model have not reached the current version. The servers keep
        their parameters, and accept the step's gradients again.
        """

    def one_memory(self) -> bool:
        """
        Return whether `flat.params` is the memory that the servers update, after `connect`.

        If so, it is also the memory of other workers, and a worker's write to it affects all of
        them.
        """

    def push(self, step: int, control: StepControl, task: int | None = None) -> Pushed:
        """
        Push the gradients to all shards, one call per shard, and wait for their answers.

        If tasks are leased, `step` counts this rank's pushes in the attempt, and `task` is the
        number of the gradient's task.

        Synchronous servers answer when they have the gradients of all ranks, asynchronous servers
        when they have applied this rank's gradients. In both cases the new parameters are in place
        when this returns, unless the result has a `norm`.
        """

    def commit(self, step: int, norm: float) -> Pushed:
        """Apply the update of `step` on all shards, and load the new parameters."""

    def refresh(self) -> None:
        """Load the newest parameters."""

    def seen(self) -> NDArray[np.bool_]:
        """
        Return which parameters have had a gradient so far, on any rank.

        Returns:
            One boolean per slot of the flat vector.
        """

    def settings(self) -> tuple[float, ...]:
        """
        Return the settings sent with the pushes of the servers' last step; empty: there were none.

        Only if the learning rate depends on evaluations, see `PlateauState`.
        """

    def left_out(self) -> bool:
        """Return whether the servers skipped their last step, e.g. because of NaN gradients."""

    def average(self) -> Tensor:
        """
        Fetch the average of the parameters after the last update, shape [n], on their device.

        Only if the job has an `ema`, and between two steps: no rank starts the next step before all
        ranks have their copy. From asynchronous shards at any time; each shard then returns its own
        current average.
        """

    def copies(self, version: int) -> list[ShardCopy] | None:
        """
        Fetch the shards' copies of a version, for a checkpoint; may be called from any thread.

        Waits while ranks have not reached that version. None: the copies no longer exist.
        """


class LoopShards(Protocol):
    """The server group, as seen by one worker's train function."""

    def connect_loop(self, vectors: Vectors, loop: LoopOptimizer) -> None:
        """
        Connect to the servers; see `Shards.connect`. The servers start with rank 0's values.

        Args:
            vectors: moved to memory that the servers can access.
            loop: the servers' optimizer; the same on all ranks, except for its state.

        Raises:
            See `Shards.connect`.
        """

    def push(self, step: int, control: StepControl) -> Pushed:
        """
        Push `grads` to all shards and wait for their answers, which are then in `params`.

        Args:
            step: number of this rank's push, from 0.
            control: this rank's control record.
        """

    def refresh(self) -> None:
        """See `Shards`."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Fetch the state of the servers' optimizer, see `FlatOptimizer.state`."""

    def leave(self) -> int:
        """
        Announce that this rank's train function has returned: other ranks stop waiting for its
        pushes.

        Returns:
            The number of ranks whose functions still run. May be called again.
        """


class RunStore(Protocol):
    """A store in which the ranks of a run leave small values for each other, at any time."""

    def first(self, name: str, value: bytes) -> bytes:
        """Store a value under a name unless the name exists; return the stored value."""


class Leases(Protocol):
    """The task scheduler, as seen by one worker."""

    def connect(self, plan: TaskPlan) -> None:
        """
        Register this worker with the task scheduler.

        Raises:
            ProtocolError: This worker's data set differs from the other workers' data set.
            ActorLost: The scheduler is lost.
        """

    def next(self, alive: Callable[[], None]) -> Lease:
        """
        Return the next lease; wait until one is available.

        Args:
            alive: called regularly during the wait.
        """

    def finish(self, tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()) -> None:
        """Report completed tasks and evaluations; returns immediately."""


class PendingPush(Protocol):
    """An asynchronous push to embedding tables."""

    def wait(self) -> None:
        """
        Wait until every server has completed the step.

        Raises:
            ActorLost: A server is lost.
            DeadlineExceeded: A rank or a server was too late.
        """


class Tables(Protocol):
    """The embedding servers, as seen by one worker (docs/embeddings.md)."""

    def connect(
        self, tables: tuple[TableSpec, ...], total_steps: int, saved: SavedState | None = None
    ) -> tuple[TablePlan, int]:
        """
        Join an attempt: from now on the servers reject messages of earlier attempts.

        Args:
            tables: the same on all ranks.
            total_steps: updates in the run, from which servers compute the learning rate.
            saved: the checkpoint to start from; servers that already have tables keep them.

        Returns:
            The servers' plan, and the number of steps that all servers have completed.

        Raises:
            ProtocolError: This worker's tables differ from the other workers' tables.
            ActorLost: A server is lost.
            DeadlineExceeded: A server did not answer.
        """

    def begin(self, version: int) -> None:
        """
        Set the tables to the step from which all ranks continue; called before the first pull and
        push.

        Servers may have completed one more step than all ranks know of, and undo it.

        Args:
            version: steps that the ranks have completed; the same on all ranks.

        Raises:
            ProtocolError: A server is at another step and cannot return to this one.
        """

    def pull(self, table: int, ids: Routed, *, keep: bool) -> NDArray[np.float32]:
        """
        Return the rows as of the last step, shape [n, width]; missing rows are not created.

        Args:
            table: number of the table.
            ids: the rows.
            keep: whether the memory stays valid until the next push instead of the next pull.
        """

    def push(
        self,
        step: int,
        gradients: Sequence[tuple[Routed, RowGradients]],
        task: int | None = None,
        skip: bool = False,
    ) -> PendingPush:
        """
        Start pushing gradients, with an entry for each table used; every rank calls this in every
        step.

        The memory of earlier pulls becomes invalid. Before the handle is done, the gradients must
        not change and nothing may be pulled. The servers add the gradients of all ranks in rank
        order and apply the sum once. Asynchronous tables apply this rank's gradients alone.

        If tasks are leased, `step` counts this rank's pushes in the attempt, and `task` is the
        number of the gradients' task.

        If one rank sets `skip`, all servers skip the step; asynchronous tables skip only that
        rank's push. The step counts as completed.
        """

    def copies(self, version: int) -> list[TablesCopy] | None:
        """
        Fetch the servers' copies of a version, for a checkpoint; may be called from any thread.

        Waits while ranks have not reached that version. None: the copies no longer exist.
        """
