"""Sharded optimizer."""

from torch import Tensor

from distplat.platform.spec import Job
from distplat.strategies.base import Collective
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.optim import LocalOptimizer


class ShardedUpdate(LocalOptimizer):
    """Not yet sharded."""

    def __init__(self, flat: FlatModel, group: Collective, job: Job, total_steps: int) -> None:
        super().__init__(flat, job, total_steps)
        self._group = group

    def last_backward(self) -> None:
        """See `Reducer`."""

    def finish(self) -> None:
        """See `Reducer`."""
        self._group.all_reduce(self._flat.grads)

    def figures(self) -> dict[str, float]:
        """See `Reducer`."""
        return {}

    def close(self) -> None:
        """See `Reducer`."""

    def state(self) -> dict[str, Tensor]:
        """Give nothing: no rank has it all."""
        return {}
