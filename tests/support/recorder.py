"""A fake rank of a group without other ranks, which records its operations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import Collective, Handle, ReduceOp, Traffic


class Pending:
    """An operation that completes in `wait`."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


class Recorder:
    """
    Rank 0 of two; the other rank contributes zeros, and operations complete only in `wait`.

    Raises an error if a tensor changes between the start and the end of its operation: it was sent
    too early.
    """

    rank, world = 0, 2

    def __init__(self, vector: Tensor) -> None:
        self._vector = vector
        self.started: list[int] = []
        """First element in the vector of each all-reduce, in the order of their starts."""
        self.controls = 0
        """All-reduces of other tensors: of control records."""
        self.broken = False
        """Whether every operation fails."""
        self.start_waits = False
        """See `Collective`."""
        self.traffic = Traffic()

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        if self.broken:
            raise CollectiveError("recorder", "all_reduce", len(self.started), (1,), "broken")
        sent = tensor.clone()
        place = tensor.data_ptr() - self._vector.data_ptr()
        if 0 <= place < self._vector.nbytes:
            self.started.append(place // tensor.itemsize)
        else:
            self.controls += 1

        def wait() -> None:
            assert torch.equal(tensor, sent), "sent before it was complete"

        return Pending(wait)

    def share(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        assert source == 0

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        self.start_all_reduce(tensor, op).wait()

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        raise NotImplementedError

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        raise NotImplementedError

    def send(self, tensor: Tensor, to: int) -> None:
        raise NotImplementedError

    def start_send(self, tensor: Tensor, to: int) -> Handle:
        raise NotImplementedError

    def recv(self, tensor: Tensor, source: int) -> None:
        raise NotImplementedError

    def barrier(self) -> None:
        """Return at once."""

    def subgroup(self, name: str, ranks: Sequence[int]) -> Collective:
        raise NotImplementedError
