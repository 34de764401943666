"""A group whose members meet anew in every attempt, for layers that keep hold of their group."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distplat.strategies.collective import Collective, Handle, ReduceOp, Traffic


class ReconnectableGroup:
    """Hands everything on to the group of the present attempt (see `Collective`)."""

    def __init__(self, group: Collective) -> None:
        self.group = group  #: to be replaced in each attempt

    @property
    def rank(self) -> int:
        """See `Collective`."""
        return self.group.rank

    @property
    def world(self) -> int:
        """See `Collective`."""
        return self.group.world

    @property
    def traffic(self) -> Traffic:
        """See `Collective`."""
        return self.group.traffic

    def share(self, like: Tensor) -> Tensor:
        """See `Collective`."""
        return self.group.share(like)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """See `Collective`."""
        self.group.all_reduce(tensor, op)

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        """See `Collective`."""
        return self.group.start_all_reduce(tensor, op)

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """See `Collective`."""
        self.group.reduce_scatter(output, inputs, op)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """See `Collective`."""
        self.group.all_gather(outputs, tensor)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """See `Collective`."""
        self.group.broadcast(tensor, source)

    def send(self, tensor: Tensor, to: int) -> None:
        """See `Collective`."""
        self.group.send(tensor, to)

    def start_send(self, tensor: Tensor, to: int) -> Handle:
        """See `Collective`."""
        return self.group.start_send(tensor, to)

    def recv(self, tensor: Tensor, source: int) -> None:
        """See `Collective`."""
        self.group.recv(tensor, source)

    def barrier(self) -> None:
        """See `Collective`."""
        self.group.barrier()

    def subgroup(self, name: str, ranks: Sequence[int]) -> Collective:
        """See `Collective`; the subgroup is of the present attempt."""
        return self.group.subgroup(name, ranks)
