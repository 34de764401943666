"""What all groups of ours have in common: averages, sub-groups, giving up, closing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distplat.actors.collectives.rendezvous import GroupMember
from distplat.actors.collectives.work import TrafficMeter, Work
from distplat.platform.topology import BackendChoice
from distplat.strategies.collective import ReduceOp, Traffic


class CollectiveGroup(ABC):
    """
    One rank of a group (see `Collective`); `reduce`, `abort` and `close` are beside the port.

    Args:
        member: which rank, of which group.
    """

    choice = BackendChoice("", "it was made without `create_group`")
    """Backend of the group, and why it is the one."""

    def __init__(self, member: GroupMember) -> None:
        self.name, self.rank, self.world = member.name, member.rank, member.world
        self.settings = member.settings
        self.traffic = Traffic()
        self._meter = TrafficMeter(self.traffic)
        self._subgroups: list[CollectiveGroup] = []
        self._closed = False
        self.make_subgroup: Callable[[str, Sequence[int]], CollectiveGroup] | None = None
        self.on_close: Callable[[], None] | None = None

    def share(self, like: Tensor) -> Tensor:
        """Give zeros like `like`; in memory that the ranks share, where there is some."""
        return torch.zeros_like(like)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Combine in place."""
        self.start_all_reduce(tensor, op).wait()

    @property
    def start_waits(self) -> bool:
        """See `Collective`."""
        return False

    @abstractmethod
    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        """Begin to combine in place; any number may be under way."""

    @abstractmethod
    def reduce(self, tensor: Tensor, op: ReduceOp, root: int) -> None:
        """Combine into the root's tensor; what the others' hold then is not defined."""

    @abstractmethod
    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """Combine everybody's r-th input into the output of rank r."""

    @abstractmethod
    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """Copy every rank's tensor to all."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Copy the source's tensor to all."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Hand a tensor to one rank."""
        self.start_send(tensor, to).wait()

    @abstractmethod
    def start_send(self, tensor: Tensor, to: int) -> Work:
        """Begin to hand a tensor to one rank."""

    @abstractmethod
    def recv(self, tensor: Tensor, source: int) -> None:
        """Fill a tensor with the next one of rank `source`."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has come here."""

    def subgroup(self, name: str, ranks: Sequence[int]) -> "CollectiveGroup":
        """
        Make a group of some of these ranks; it ends with this group at the latest.

        Raises:
            ValueError: this group was not made by `create_group`, or is closed.
        """
        if self.make_subgroup is None:
            why = "it is closed" if self._closed else "Ray's own call made it"
            raise ValueError(f"group {self.name!r} cannot be divided: {why}")
        part = self.make_subgroup(name, ranks)
        self._subgroups.append(part)
        return part

    def abort(self) -> None:
        """
        Make this rank's pending operations fail soon; may be called from any thread.

        This ends all groups that have these settings: sub-groups, and the one this was cut from.
        """
        self.settings.abandoned.set()
        for part in self._subgroups:
            part.abort()
        self._abort()

    def close(self) -> None:
        """Leave the group and those cut from it; peers in an operation fail soon."""
        if self._closed:
            return
        self._closed = True
        for part in self._subgroups:
            part.close()
        on_close, self.on_close = self.on_close, None
        self.make_subgroup = None  # it leads back here: without the circle memory goes at once
        self._subgroups.clear()
        try:
            self._leave()
        finally:
            if on_close is not None:
                on_close()

    @abstractmethod
    def _abort(self) -> None:
        """Make pending operations of this group fail soon."""

    @abstractmethod
    def _leave(self) -> None:
        """Give connections and memory back."""

    def _average(self, tensor: Tensor, op: ReduceOp) -> None:
        """Divide what `summed` has had summed."""
        if op is ReduceOp.AVG:
            tensor.div_(self.world)


def summed(op: ReduceOp) -> ReduceOp:
    """Give how the bytes are combined: an average is a sum that is divided in the end."""
    return ReduceOp.SUM if op is ReduceOp.AVG else op
