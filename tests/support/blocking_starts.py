"""In-memory all-reduces that block at their start, as gloo's first operations do."""

import pytest
from torch import Tensor

from distplat.strategies.collective import Handle, ReduceOp
from distplat.strategies.fakes import InMemoryCollective


class _Done(Handle):
    def wait(self) -> None:
        """Return at once."""


def block_starts(patch: pytest.MonkeyPatch, *, start_waits: bool) -> None:
    """
    Make each start of an all-reduce wait for the other ranks.

    Args:
        patch: restores the original methods.
        start_waits: value of the property. With NCCL it is false, though a started operation may
            block the rank's operations in other groups.
    """

    def start(group: InMemoryCollective, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        group.all_reduce(tensor, op)
        return _Done()

    patch.setattr(InMemoryCollective, "start_all_reduce", start)
    patch.setattr(InMemoryCollective, "start_waits", property(lambda group: start_waits))
