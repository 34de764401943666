"""Base class of all collective groups: averages, sub-groups, abort and close."""

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
    One rank of a group (see `Collective`); `reduce`, `abort` and `close` are not part of the port.

    Args:
        member: the rank and its group.
    """

    choice = BackendChoice("", "the group was created without `create_group`")
    """Backend of the group, and the reason for it."""

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
        """Return zeros like `like`; in shared memory, if the group has any."""
        return torch.zeros_like(like)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Reduce in place."""
        self.start_all_reduce(tensor, op).wait()

    @property
    def start_waits(self) -> bool:
        """See `Collective`."""
        return False

    @abstractmethod
    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        """Start an all-reduce in place; any number of operations may be in flight."""

    @abstractmethod
    def reduce(self, tensor: Tensor, op: ReduceOp, root: int) -> None:
        """Reduce into the root's tensor; the tensors of other ranks are undefined afterwards."""

    @abstractmethod
    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """Reduce the r-th inputs of all ranks into the output of rank r."""

    @abstractmethod
    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """Copy every rank's tensor to all ranks."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Copy the source's tensor to all ranks."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor to one rank."""
        self.start_send(tensor, to).wait()

    @abstractmethod
    def start_send(self, tensor: Tensor, to: int) -> Work:
        """Start to send a tensor to one rank."""

    @abstractmethod
    def recv(self, tensor: Tensor, source: int) -> None:
        """Receive the next message of rank `source` into `tensor`."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank has called this."""

    def subgroup(self, name: str, ranks: Sequence[int]) -> "CollectiveGroup":
        """
        Create a group of some of these ranks; closing this group closes it, too.

        Raises:
            ValueError: this group was not created by `create_group`, or is closed.
        """
        if self.make_subgroup is None:
            why = "it is closed" if self._closed else "it was created by a call of Ray"
            raise ValueError(f"group {self.name!r} cannot have sub-groups: {why}")
        subgroup = self.make_subgroup(name, ranks)
        self._subgroups.append(subgroup)
        return subgroup

    def abort(self) -> None:
        """
        Make this rank's pending operations fail soon; may be called from any thread.

        Aborts all groups with the same settings: the sub-groups, and the parent group.
        """
        self.settings.abandoned.set()
        for subgroup in self._subgroups:
            subgroup.abort()
        self._abort()

    def close(self) -> None:
        """Leave the group and its sub-groups; operations of its peers fail soon."""
        if self._closed:
            return
        self._closed = True
        for subgroup in self._subgroups:
            subgroup.close()
        on_close, self.on_close = self.on_close, None
        self.make_subgroup = None  # breaks a reference cycle, so that memory is freed at once
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
        """Release connections and memory."""

    def _average(self, tensor: Tensor, op: ReduceOp) -> None:
        """Divide a sum by the number of ranks if `op` is AVG."""
        if op is ReduceOp.AVG:
            tensor.div_(self.world)


def sum_for_avg(op: ReduceOp) -> ReduceOp:
    """Return SUM for AVG, whose sum is divided afterwards, and any other `op` unchanged."""
    return ReduceOp.SUM if op is ReduceOp.AVG else op
