"""What `ring` asks of a way to sum gradients; one file per way beside this one."""

from __future__ import annotations

from typing import Protocol

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.training.control import StepControl
from distplat.strategies.training.flat import FlatModel


def several_types(flat: FlatModel, option: str = "compression") -> SpecError:
    """Say that an option is for gradients of one type."""
    types = sorted({segment.dtype for segment in flat.layout.segments})
    text = f"is for models of one type; the trainable parameters are {' and '.join(types)}"
    return SpecError(Problem(("strategy", option), text, "remove it"))


class Reducer(Protocol):
    """
    Sums `flat.grads` over the group, in every step once.

    It works on the vectors that `flat` had when it was made; a model that moves needs another.
    After an error it is of no more use, as is its group.
    """

    def last_backward(self) -> None:
        """Be told that the step's last backward begins; skipped on a rank without samples."""

    def finish(self, local: StepControl) -> StepControl:
        """
        Return with the sum over all ranks in `flat.grads`; the local gradients are all there.

        Args:
            local: this rank's control record, without a look at the gradients.

        Returns:
            The sum of all ranks' records. Where it is not finite the gradients may be anything.

        Raises:
            CollectiveError: a rank is missing.
        """

    def figures(self) -> dict[str, float]:
        """
        Give the figures of the step just made, called once per step after its update.

        Names and units are those of docs/metrics.md.
        """

    def close(self) -> None:
        """
        Take the hooks off the model; waits for nothing.

        Either no operation is under way, or the group was given up: then its vectors are too.
        """
