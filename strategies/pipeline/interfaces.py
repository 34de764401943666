"""Protocols between a pipeline's executor, its source of micro-batches and gradient sync."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
from distplat.strategies.collective import Collective
from distplat.strategies.loop.control import StepControl
from distplat.strategies.worker_strategy import Context

GatherVersions = Callable[[int], list[int]]
"""Gathers the version of each rank's part over all ranks of the grid, in rank order."""


class TraceSpan(NamedTuple):
    """One action of a rank and its time span; seconds of the process's clock."""

    kind: str
    """`F`, `B`, `W`, `send`, `recv`."""
    chunk: int
    micro_batch: int
    start: float
    end: float


class Source(Protocol):
    """Provides the micro-batches of a plan and computes the loss of the last stage's outputs."""

    sizes: Sequence[int]
    """Samples of each micro-batch."""
    varies: bool
    """Whether micro-batches of one size may differ in shape; set on ranks that read data."""

    def inputs(self, micro_batch: int) -> Any:
        """Return and release the inputs of a micro-batch; called on ranks of the first stage."""

    def peek(self, micro_batch: int) -> Any:
        """Return the same inputs without releasing them; called before `inputs`."""

    def loss(self, micro_batch: int, outputs: Any) -> Any:
        """Return the loss for backward; called on ranks of the last stage."""

    def seed(self, micro_batch: int) -> int:
        """Return the seed of the micro-batch's dropout."""


class BackwardListener(Protocol):
    """Notified when gradients become final."""

    def last_backward(self) -> None:
        """Called before a backward that makes gradients final; does nothing by default."""
        return

    def pause(self) -> None:
        """Called after that backward; does nothing by default."""
        return


class GradSync(BackwardListener, Protocol):
    """Gradient sync and update of one part of the model, over all attempts of a run."""

    completed: StepControl | None
    """Control record of the step in flight, if the last `sync_state` completed that step."""

    def sync_state(
        self, group: Collective | None, context: Context, versions: GatherVersions
    ) -> int:
        """
        Start a new attempt, and bring the part to the version that all ranks agree on.

        Args:
            group: the data-parallel peers; None: there are none.
            context: with the attempt's ports.
            versions: a collective operation: every rank calls it equally often.

        Returns:
            Completed steps of the part.

        Raises:
            CollectiveError: a rank is missing.
            StateLost: no remaining rank or server has the state of this part.
        """

    def begin(self, step: int, local: StepControl) -> StepControl:
        """
        Check this rank's gradients for NaN, and sum them if that does not depend on other parts.

        Args:
            step: current step.
            local: this rank's control record.

        Returns:
            The record, with the parameter whose gradient is not finite, if there is one.

        Raises:
            CollectiveError: a rank is missing.
        """

    def sum_gradients(self, step: int, total: StepControl) -> StepControl:
        """
        Wait until the peers' gradients of a step are summed.

        Args:
            step: current step.
            total: the control record of all ranks, with `present` of this rank.

        Returns:
            The same record with `present` of all peers.

        Raises:
            CollectiveError: a peer is missing.
        """

    def squared_norm(self) -> float:
        """Return the squared 2-norm of the sum, without tensors that another slice counts."""

    def prepare_update(self, norm: float | None) -> None:
        """Called before `update` with the whole gradient's norm; None: the job does not clip."""

    def update(self, step: int, total: StepControl) -> None:
        """Apply the update of a step, unless the record says to skip it."""

    def part(self, version: int) -> CheckpointPart:
        """Return the part for a checkpoint."""

    def average(self) -> Tensor:
        """Return the average of the part, shape [n]; see `WorkerStrategy.average`."""

    def figures(self) -> dict[str, float]:
        """Return the figures of the last step."""
