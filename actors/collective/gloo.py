"""
A gloo backend for `ray.util.collective` whose groups are private and whose waits end.

Ray's own makes the first group the process's torch world; later groups repeat its ranks, and an
operation waits half an hour for a frozen peer. Here each group has a process group and a store of
its own, an operation ends after the group's deadline, and the error names the ranks that are
missing (`pulse.py`). A group in which an operation failed is broken: every later one fails
at once. (docs/decisions/private_gloo_groups.md)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from ray.util.collective import types
from torch import Tensor

from distplat.actors.collective.gloo_link import Link
from distplat.actors.collective.group import Group
from distplat.actors.collective.header import header
from distplat.strategies.algorithms.ring import traffic_elements
from distplat.strategies.collective import Handle

dist: Any = torch.distributed  # torch's stubs leave out most of ProcessGroupGloo

BACKEND = "DISTPLAT_GLOO"

_OPS = {
    types.ReduceOp.SUM: dist.ReduceOp.SUM,
    types.ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
    types.ReduceOp.MIN: dist.ReduceOp.MIN,
    types.ReduceOp.MAX: dist.ReduceOp.MAX,
}


class GlooGroup(Group):
    """One rank's end of a private gloo group (see Ray's `BaseGroup` for the calls)."""

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self._link = Link(group_name, rank, world_size, self.settings, self.traffic)

    @classmethod
    def backend(cls) -> str:
        """Name under which Ray knows this backend."""
        return BACKEND

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Whether this torch was built with gloo."""
        return bool(dist.is_gloo_available())

    def destroy_group(self) -> None:
        """Close the connections; peers in an operation fail at once."""
        self._link.close()

    def abort(self) -> None:
        """See `Group`."""
        self._link.abort()

    def allreduce(self, tensors: list[Tensor], allreduce_options: Any) -> None:
        """Reduce in place."""
        self.start_allreduce(tensors[0], allreduce_options.reduceOp).wait()

    def start_allreduce(self, tensor: Tensor, op: types.ReduceOp) -> Handle:
        """See `Group`. The first ones wait for the others' headers before they return."""
        sent, received = traffic_elements(tensor.numel(), self.rank, self.world_size)
        return self._link.start(
            header("all_reduce", [tensor], op),
            lambda group: [begin_allreduce(group, tensor, op)] if tensor.numel() else [],
            (sent * tensor.itemsize, received * tensor.itemsize),
        ).tell_when_over()

    def reduce(self, tensors: list[Tensor], reduce_options: Any) -> None:
        """Reduce into the root's tensor; the others' hold parts of sums then."""
        tensor, op, root = tensors[0], reduce_options.reduceOp, reduce_options.root_rank
        here = self.rank == root
        others = tensor.nbytes * (self.world_size - 1)
        self._link.start(
            header("reduce", [tensor], op, root),
            lambda group: [_begin_reduce(group, tensor, op, root)] if tensor.numel() else [],
            (0, others) if here else (tensor.nbytes, 0),
        ).wait()

    def broadcast(self, tensors: list[Tensor], broadcast_options: Any) -> None:
        """Copy the root's tensor to all."""
        tensor, root = tensors[0], broadcast_options.root_rank
        others = tensor.nbytes * (self.world_size - 1)
        self._link.start(
            header("broadcast", [tensor], root=root),
            lambda group: [begin_broadcast(group, tensor, root)] if tensor.numel() else [],
            (others, 0) if self.rank == root else (0, tensor.nbytes),
        ).wait()

    def allgather(
        self, tensor_lists: list[list[Tensor]], tensors: list[Tensor], allgather_options: Any = None
    ) -> None:
        """Copy every rank's tensor to all; they may be of uneven sizes."""
        outputs, tensor = tensor_lists[0], tensors[0]
        # Gloo takes even sizes only. Sizes that differ by one element are what happens.
        longest = max(output.numel() for output in outputs)
        padded = tensor.new_empty(longest)
        padded[: tensor.numel()] = tensor.reshape(-1)
        table = tensor.new_empty(self.world_size, longest)

        def spread() -> None:
            for row, output in zip(table, outputs, strict=True):
                output.copy_(row[: output.numel()].view(output.shape))

        sizes = [*outputs[: self.rank], tensor, *outputs[self.rank + 1 :]]
        moved = sum(output.nbytes for output in outputs) - tensor.nbytes
        self._link.start(
            header("all_gather", sizes),
            lambda group: [group._allgather_base(table.view(-1), padded)] if longest else [],
            (tensor.nbytes * (self.world_size - 1), moved),
            spread,
        ).wait()

    def reducescatter(
        self, tensors: list[Tensor], tensor_lists: list[list[Tensor]], reducescatter_options: Any
    ) -> None:
        """Reduce the n-th tensors of all ranks into rank n's; they may be of uneven sizes."""
        output, inputs, op = tensors[0], tensor_lists[0], reducescatter_options.reduceOp
        # Gloo's own takes even sizes only and moves as much as an all-reduce. A reduce to each
        # rank moves half of that; it writes into what it is given, so it is given copies.
        copies = [part.clone() for part in inputs]

        def begin(group: Any) -> Sequence[Any]:
            return [_begin_reduce(group, c, op, n) for n, c in enumerate(copies) if c.numel()]

        def keep() -> None:
            output.copy_(copies[self.rank])

        mine, others = inputs[self.rank].nbytes, self.world_size - 1
        moved = (sum(part.nbytes for part in inputs) - mine, mine * others)
        self._link.start(header("reduce_scatter", inputs, op), begin, moved, keep).wait()

    def send(self, tensors: list[Tensor], send_options: Any) -> None:
        """Send to one rank."""
        self.start_send(tensors[0], send_options.dst_rank).wait()

    def start_send(self, tensor: Tensor, to: int) -> Handle:
        """See `Group`. The handle is done when the other rank has come for it."""
        return self._link.start_send(tensor, to)

    def recv(self, tensors: list[Tensor], recv_options: Any) -> None:
        """Receive from one rank."""
        self._link.recv(tensors[0], recv_options.src_rank)

    def barrier(self, barrier_options: Any = None) -> None:
        """Wait for all."""
        self._link.start(header("barrier"), lambda group: [group.barrier()]).wait()


def begin_allreduce(group: Any, tensor: Tensor, op: types.ReduceOp) -> Any:
    """Begin a ring all-reduce in a process group; gives the work."""
    options = dist.AllreduceOptions()
    options.reduceOp = _OPS[op]
    return group.allreduce([tensor], options)


def begin_broadcast(group: Any, tensor: Tensor, root: int) -> Any:
    """Begin a broadcast in a process group; gives the work."""
    options = dist.BroadcastOptions()
    options.rootRank = root
    return group.broadcast([tensor], options)


def _begin_reduce(group: Any, tensor: Tensor, op: types.ReduceOp, root: int) -> Any:
    options = dist.ReduceOptions()
    options.reduceOp, options.rootRank = _OPS[op], root
    return group.reduce([tensor], options)
