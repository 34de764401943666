"""What `ring` asks of a way to sum gradients; one file per way beside this one."""

from typing import Protocol


class Reducer(Protocol):
    """Sums `flat.grads` over the group, in every step once."""

    def last_backward(self) -> None:
        """Be told that the step's last backward begins; skipped on a rank without samples."""

    def finish(self) -> None:
        """
        Return with the sum over all ranks in `flat.grads`; the local gradients are all there.

        Raises:
            CollectiveError: a rank is missing.
        """

    def figures(self) -> dict[str, float]:
        """Give the figures of the step just reduced; names are those of docs/metrics.md."""

    def close(self) -> None:
        """Take the hooks off the model; nothing is under way any more."""
