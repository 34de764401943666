"""All-reduces in memory whose start waits for the other ranks, as that of gloo's first ones."""

import pytest
from torch import Tensor

from distplat.strategies.collective import Handle, ReduceOp
from distplat.strategies.fakes import InMemoryCollective


class _Over(Handle):
    def wait(self) -> None:
        """Return at once."""


def block_starts(patch: pytest.MonkeyPatch, *, said: bool) -> None:
    """
    Have each start of an all-reduce wait for the other ranks.

    Args:
        patch: undoes it.
        said: whether the group says so. As NCCL does not: there what a rank has started may hold up
            its operations in other groups.
    """

    def start(group: InMemoryCollective, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        group.all_reduce(tensor, op)
        return _Over()

    patch.setattr(InMemoryCollective, "start_all_reduce", start)
    patch.setattr(InMemoryCollective, "start_waits", property(lambda group: said))
