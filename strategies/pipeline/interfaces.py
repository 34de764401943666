"""What the executor of a pipeline asks of those around it, and what it tells them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
from distplat.strategies.collective import Collective
from distplat.strategies.loop.control import StepControl
from distplat.strategies.worker_strategy import Context

GatherVersions = Callable[[int], list[int]]
"""Tells all ranks of the grid the version of this one's part; gives those of all, in rank order."""


class TraceSpan(NamedTuple):
    """What was done, and when; seconds of the process's clock."""

    kind: str
    """`F`, `B`, `W`, `send`, `recv`."""
    chunk: int
    micro_batch: int
    start: float
    end: float


class Source(Protocol):
    """Gives the micro-batches of a step, and takes what comes of them."""

    sizes: Sequence[int]
    """Samples of each micro-batch."""
    varies: bool
    """Whether micro-batches of one size may differ in form; known where they are read."""

    def inputs(self, micro_batch: int) -> Any:
        """Give what enters the first place; asked on its rank."""

    def peek(self, micro_batch: int) -> Any:
        """Give the same, which will be asked for once more."""

    def loss(self, micro_batch: int, outputs: Any) -> Any:
        """Give what is to be differentiated; asked on the last place's rank."""

    def seed(self, micro_batch: int) -> int:
        """Seed the micro-batch's dropout."""


class BackwardListener(Protocol):
    """Told when gradients become final."""

    def last_backward(self) -> None:
        """What the backward that begins now makes is final; nothing is done by default."""
        return

    def pause(self) -> None:
        """It is over."""
        return


class GradSync(BackwardListener, Protocol):
    """How the gradients of one part of the model become an update, over all attempts of a run."""

    made: bool
    """Whether the last `sync_state` found the step in flight made, with this rank's share."""

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
        Look at this rank's gradients of a step, and sum what needs no word of other parts.

        Args:
            step: the present one.
            local: this rank's control record.

        Returns:
            The record, with what was found in the gradients.

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
        """Give the squared 2-norm of the sum; what counts for another slice is left out."""

    def ready(self, norm: float | None) -> None:
        """Called with the norm of the whole gradient, where the job clips; `update` is next."""

    def update(self, step: int, total: StepControl) -> None:
        """Make the update of a step, unless the record says that it is left out."""

    def part(self, version: int) -> CheckpointPart:
        """Give the part for a checkpoint."""

    def figures(self) -> dict[str, float]:
        """Give the figures of the step just made."""
