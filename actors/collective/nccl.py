"""
Ray's own NCCL group behind our calls: each rank has a whole GPU and cupy.

Ray begins an operation on a stream of its own and does not wait for it. So the torch stream is
waited for before, Ray's streams are watched after, and an operation that is not over at the
deadline is cut off by aborting the communicators. NCCL does not tell who was missing.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ray.util.collective import types
from torch import Tensor

from distplat.actors.collective.group import Group
from distplat.platform.errors import CollectiveError
from distplat.strategies.algorithms.ring import traffic_elements
from distplat.strategies.collective import Handle

cuda: Any = torch.cuda  # half of it is not typed

BACKEND = "DISTPLAT_NCCL"
_LOOK_AGAIN_S = 0.0001


class NcclGroup(Group):
    """One rank's end of an NCCL group (see Ray's `BaseGroup` for the calls)."""

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        from ray.util.collective.collective_group.nccl_collective_group import NCCLGroup  # cupy

        self._ray = NCCLGroup(world_size, rank, group_name)
        self._number = 0
        self._aborted = False

    @classmethod
    def backend(cls) -> str:
        """Name under which Ray knows this backend."""
        return BACKEND

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Whether there is a GPU, and cupy."""
        return cuda.is_available() and bool(types.cupy_available())

    def destroy_group(self) -> None:
        """Give the communicators back; after an abort there are none."""
        if not self._aborted:
            self._ray.destroy_group()

    def abort(self) -> None:
        """See `Group`."""
        self._aborted = True
        for communicators in (self._ray._dev_comm_map or {}).values():
            for communicator in communicators or ():
                communicator.abort()

    def allreduce(self, tensors: list[Tensor], allreduce_options: Any) -> None:
        """Reduce in place."""
        self.start_allreduce(tensors[0], allreduce_options.reduceOp).wait()

    def start_allreduce(self, tensor: Tensor, op: types.ReduceOp) -> Handle:
        """See `Group`."""
        options = types.AllReduceOptions()
        options.reduceOp = op
        sent, received = traffic_elements(tensor.numel(), self.rank, self.world_size)
        moved = (sent * tensor.itemsize, received * tensor.itemsize)
        return self._start("all_reduce", partial(self._ray.allreduce, [tensor], options), moved)

    def reduce(self, tensors: list[Tensor], reduce_options: Any) -> None:
        """Reduce into the root's tensor."""
        here, nbytes = self.rank == reduce_options.root_rank, tensors[0].nbytes
        moved = (0, nbytes * (self.world_size - 1)) if here else (nbytes, 0)
        self._start("reduce", partial(self._ray.reduce, tensors, reduce_options), moved).wait()

    def broadcast(self, tensors: list[Tensor], broadcast_options: Any) -> None:
        """Copy the root's tensor to all."""
        here, nbytes = self.rank == broadcast_options.root_rank, tensors[0].nbytes
        moved = (nbytes * (self.world_size - 1), 0) if here else (0, nbytes)
        begin = partial(self._ray.broadcast, tensors, broadcast_options)
        self._start("broadcast", begin, moved).wait()

    def allgather(
        self, tensor_lists: list[list[Tensor]], tensors: list[Tensor], allgather_options: Any = None
    ) -> None:
        """Copy every rank's tensor to all, one broadcast each: sizes may be uneven."""
        outputs = tensor_lists[0]
        outputs[self.rank].copy_(tensors[0])
        for rank, output in enumerate(outputs):
            options = types.BroadcastOptions()
            options.root_rank = rank
            if output.numel():
                self.broadcast([output], options)

    def reducescatter(
        self, tensors: list[Tensor], tensor_lists: list[list[Tensor]], reducescatter_options: Any
    ) -> None:
        """Reduce the n-th tensors of all ranks into rank n's, one by one; sizes may be uneven."""
        for rank, part in enumerate(tensor_lists[0]):
            options, copy = types.ReduceOptions(), part.clone()
            options.reduceOp, options.root_rank = reducescatter_options.reduceOp, rank
            if part.numel():
                self.reduce([copy], options)
            if rank == self.rank:
                tensors[0].copy_(copy)

    def send(self, tensors: list[Tensor], send_options: Any) -> None:
        """Send to one rank."""
        begin = partial(self._ray.send, tensors, send_options)
        self._start("send", begin, (tensors[0].nbytes, 0)).wait()

    def recv(self, tensors: list[Tensor], recv_options: Any) -> None:
        """Receive from one rank."""
        begin = partial(self._ray.recv, tensors, recv_options)
        self._start("recv", begin, (0, tensors[0].nbytes)).wait()

    def barrier(self, barrier_options: Any = None) -> None:
        """Wait for all."""
        self._start("barrier", self._ray.barrier, (0, 0)).wait()

    def _start(
        self, operation: str, begin: Callable[[], None], moved: tuple[int, int]
    ) -> "_OnStream":
        self._number += 1
        self.refuse_if_given_up(operation, self._number)
        began = time.perf_counter()
        cuda.current_stream().synchronize()  # Ray's stream would not wait for torch's
        begin()
        events = []
        for stream in (s for streams in self._ray._dev_streams_map.values() for s in streams):
            events.append(cuda.Event())
            events[-1].record(cuda.ExternalStream(stream.ptr))
        self.traffic.sent_bytes += moved[0]
        self.traffic.received_bytes += moved[1]
        return _OnStream(self, operation, self._number, events, began)

    def refuse_if_given_up(self, operation: str, number: int) -> None:
        """Raise `CollectiveError` if nobody wants this group any more."""
        if self._aborted or self.settings.abandoned.is_set():
            cause = "this rank was told to give up"
            raise CollectiveError(self.group_name, operation, number, (), cause)


class _OnStream:
    """An operation under way on Ray's streams (see `Handle`)."""

    def __init__(
        self, group: NcclGroup, operation: str, number: int, events: list[Any], began: float
    ) -> None:
        self._group, self._operation, self._number = group, operation, number
        self._events, self._began = events, began

    def wait(self) -> None:
        """Return when the result is there; abort all if it is not in time."""
        group, limit = self._group, self._group.settings.operation_s
        deadline = self._began + limit
        while not all(event.query() for event in self._events):
            group.refuse_if_given_up(self._operation, self._number)
            if time.perf_counter() > deadline:
                group.abort()
                cause = f"deadline {limit:g} s; NCCL does not tell who was missing"
                raise CollectiveError(group.group_name, self._operation, self._number, (), cause)
            time.sleep(_LOOK_AGAIN_S)
        group.traffic.working_s += time.perf_counter() - self._began
