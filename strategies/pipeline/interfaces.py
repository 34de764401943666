"""Protocols between a pipeline's executor, the micro-batches and the exchange of gradients."""

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
    """One action of a rank, and when it ran; seconds of the process's clock."""

    kind: str
    """`F`, `B`, `W`, `send`, `recv`."""
    chunk: int
    micro_batch: int
    start: float
    end: float


class Source(Protocol):
    """Gives the micro-batches of a plan, and the loss of the last stage's outputs."""

    sizes: Sequence[int]
    """Samples of each micro-batch."""
    varies: bool
    """Whether micro-batches of one size may differ in shape; known on ranks that read data."""

    def inputs(self, micro_batch: int) -> Any:
        """Give the inputs of a micro-batch, once; called on ranks of the first stage."""

    def peek(self, micro_batch: int) -> Any:
        """Give the same inputs, before `inputs` gives them."""

    def loss(self, micro_batch: int, outputs: Any) -> Any:
        """Give the loss, to be differentiated; called on ranks of the last stage."""

    def seed(self, micro_batch: int) -> int:
        """Give the seed of the micro-batch's dropout."""


class BackwardListener(Protocol):
    """Called when gradients become final."""

    def last_backward(self) -> None:
        """Called when a backward begins whose gradients are final; by default does nothing."""
        return

    def pause(self) -> None:
        """Called when that backward is over; by default does nothing."""
        return


class GradSync(BackwardListener, Protocol):
    """How the gradients of one part of the model become an update, over all attempts of a run."""

    made: StepControl | None
    """The record of all ranks of the step in flight, if the last `sync_state` found it made, with
    this rank's share."""

    def sync_state(
        self, group: Collective | None, context: Context, versions: GatherVersions
    ) -> int:
        """
        Meet in a new attempt, and bring the part to the version that all have.

        Args:
            group: the peers; None: there are none.
            context: with the attempt's ports.
            versions: to be asked as often by every rank.

        Returns:
            Steps that the part has behind it.

        Raises:
            CollectiveError: a rank is missing.
            StateLost: nobody that is left has what this part needs.
        """

    def begin(self, step: int, local: StepControl) -> StepControl:
        """
        Check this rank's gradients for NaN, and sum them if other parts need not agree first.

        Args:
            step: the present one.
            local: this rank's control record.

        Returns:
            The record, with the parameter whose gradient is not finite, if there is one.

        Raises:
            CollectiveError: a rank is missing.
        """

    def sum_gradients(self, step: int, total: StepControl) -> StepControl:
        """
        Return when the peers' gradients of a step are summed.

        Args:
            step: the present one.
            total: the control record of all ranks; `present` is this rank's own.

        Returns:
            The same, with `present` of all peers.

        Raises:
            CollectiveError: a peer is missing.
        """

    def squares(self) -> float:
        """Give the squared 2-norm of the sum, without what another slice counts."""

    def ready(self, norm: float | None) -> None:
        """Called with the norm of the whole gradient, where the job clips; `update` is next."""

    def update(self, step: int, total: StepControl) -> None:
        """Make the update of a step, unless the record says that it is left out."""

    def part(self, version: int) -> CheckpointPart:
        """Give the part for a checkpoint."""

    def average(self) -> Tensor:
        """Give the average of the part, shape [n]; see `WorkerStrategy.average`."""

    def figures(self) -> dict[str, float]:
        """Give the figures of the step just made."""
