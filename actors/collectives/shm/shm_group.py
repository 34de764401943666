"""
A group of ranks on one node that communicate through shared memory.

Rank 0 creates the memory and publishes its address in Ray's store; the other ranks map it. All
further communication is in the memory, with futexes as signals: no server, no sockets, no copies
through the kernel.
(docs/decisions/shared_memory_collectives.md)
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import ray
import torch
from torch import Tensor
from typing_extensions import override

from distplat.actors.collectives.group import CollectiveGroup, sum_for_avg
from distplat.actors.collectives.header import STAGED, Header, header, supported
from distplat.actors.collectives.rendezvous import (
    GIVEN_UP,
    GroupMember,
    find_address,
    publish_address,
    wait_for_all,
    withdraw_address,
)
from distplat.actors.collectives.shm.communicator import ShmCommunicator, TrafficBytes
from distplat.actors.collectives.shm.liveness import LivenessMonitor, RunningOp
from distplat.actors.collectives.shm.p2p import PointToPoint
from distplat.actors.collectives.shm.segment import GroupSegment, SegmentLayout, create_vector
from distplat.actors.collectives.work import OpQueue, Work
from distplat.actors.messages import MemoryAddress
from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import ReduceOp

_CLOSE_S = 2.0


class ShmGroup(CollectiveGroup):
    """
    One rank of a group on one node; tensors are on the CPU or on CUDA devices.

    After a failed operation, all later operations fail on all ranks.

    Args:
        member: the rank and its group.
        segment: the shared memory, for a rendezvous without Ray.

    Raises:
        DeadlineExceeded: a rank did not join within `settings.rendezvous_s`.
        CollectiveError: the memory cannot be mapped, or `settings.abandoned` was set.
    """

    def __init__(self, member: GroupMember, *, segment: GroupSegment | None = None) -> None:
        super().__init__(member)
        name, settings, uses_ray = member.name, member.settings, segment is None
        self._segment = segment or self._find_segment()
        self._liveness = LivenessMonitor(name, self._segment, settings)
        self._communicator = ShmCommunicator(name, self._segment, self._liveness)
        self._vectors = self._communicator.vectors
        self._messages = PointToPoint(name, self._segment, self._liveness)
        self._queue = OpQueue(f"shm {name}")
        self._number = 0  #: operations of all ranks so far
        self._communicator.enter()
        try:
            wait_for_all(name, self._segment.absent, settings)
        except BaseException:
            self.close()
            raise
        finally:
            if uses_ray and self.rank == 0:
                withdraw_address(name)
        self._segment.segment.seal()  # all ranks have mapped the memory
        self._liveness.start()

    @override
    def barrier(self) -> None:
        self._run(header("barrier"), self._communicator.barrier)

    @override
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        self._queue.run(partial(self._all_reduce, tensor, op))

    @override
    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        if tensor.is_cuda:  # the group's thread does not know which stream fills the tensor
            torch.cuda.current_stream(tensor.device).synchronize()
        return self._queue.submit(partial(self._all_reduce, tensor, op))

    def _all_reduce(self, tensor: Tensor, op: ReduceOp) -> None:
        flat = to_host(tensor)
        offset = self._vectors.offset(flat)
        all_reduce = self._communicator.all_reduce
        operation = partial(all_reduce, flat, sum_for_avg(op), shared=offset != STAGED)
        self._perform(header("all_reduce", [flat], op, offset=offset), operation)
        copy_back(flat, tensor)
        self._average(tensor, op)

    @override
    def reduce(self, tensor: Tensor, op: ReduceOp, root: int) -> None:
        """Reduce into the root's tensor; the tensors of other ranks do not change."""
        flat = to_host(tensor)
        offset = self._vectors.offset(flat)
        operation = partial(self._communicator.reduce, flat, op, root, shared=offset != STAGED)
        self._run(header("reduce", [flat], op, root=root, offset=offset), operation)
        copy_back(flat, tensor)

    @override
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        flat = to_host(tensor)
        offset = self._vectors.offset(flat)
        operation = partial(self._communicator.broadcast, flat, source, shared=offset != STAGED)
        self._run(header("broadcast", [flat], root=source, offset=offset), operation)
        copy_back(flat, tensor)

    @override
    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        flat, parts = to_host(tensor), [to_host(output) for output in outputs]
        self._check_parts(parts, flat)
        offsets = self._vectors.offsets(parts)
        operation = partial(self._communicator.all_gather, parts, flat, shared=bool(offsets))
        self._run(header("all_gather", parts, offsets=offsets), operation)
        for part, output in zip(parts, outputs, strict=True):
            copy_back(part, output)

    @override
    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        flat, parts = to_host(output), [to_host(part) for part in inputs]
        self._check_parts(parts, flat)
        offsets = self._vectors.offsets(parts)
        reduce_scatter = self._communicator.reduce_scatter
        operation = partial(reduce_scatter, flat, parts, sum_for_avg(op), shared=bool(offsets))
        self._run(header("reduce_scatter", parts, op, offsets=offsets), operation)
        copy_back(flat, output)
        self._average(output, op)

    @override
    def share(self, like: Tensor) -> Tensor:
        """Return zeros like `like`; a CPU vector is mapped by all ranks."""
        if like.device.type != "cpu":
            return torch.zeros_like(like)
        segment, tensor = create_vector(like)
        try:
            operation = partial(self._communicator.share, segment)
            self._run(header("share", [tensor]), operation)
        finally:
            segment.seal()
        return tensor

    @override
    def start_send(self, tensor: Tensor, to: int) -> Work:
        """Send to rank `to`; waits only if it has not received two earlier messages."""
        flat = to_host(tensor)
        op = self._run_message(partial(self._messages.send, flat, to))
        self._count_traffic(op, flat.nbytes, 0)
        return Work()

    @override
    def recv(self, tensor: Tensor, source: int) -> None:
        flat = to_host(tensor)
        op = self._run_message(partial(self._messages.receive, flat, source))
        self._count_traffic(op, 0, flat.nbytes)
        copy_back(flat, tensor)

    @override
    def _abort(self) -> None:
        self._liveness.abort(GIVEN_UP)

    @override
    def _leave(self) -> None:
        """Leave the group once its messages are received; waits for this rank fail soon."""
        self._messages.drain()
        self._liveness.abort("this rank has left the group")
        self._segment.leave()
        self._segment.segment.seal()
        self._queue.close(_CLOSE_S)
        self._messages.close()
        self._liveness.close()

    def _run(self, head: Header, operation: Callable[[], TrafficBytes]) -> None:
        """Run an operation in the group's queue, and wait for it."""
        self._queue.run(partial(self._perform, head, operation))

    def _perform(self, head: Header, operation: Callable[[], TrafficBytes]) -> None:
        """Run an operation now, as the next one of the group."""
        number = self._number
        running = RunningOp(head.name, number)
        self._liveness.check(running)
        self._number += 1
        self._communicator.begin(head, running)
        try:
            sent, received = operation()
        except BaseException as error:
            self._break(error, f"{head.name} #{number}")
            raise
        self._count_traffic(running, sent, received)

    def _run_message(self, message: Callable[[], RunningOp]) -> RunningOp:
        try:
            return message()
        except BaseException as error:
            self._break(error, "a message")
            raise

    def _break(self, error: BaseException, operation: str) -> None:
        """Make later operations fail, and other ranks' waits for this rank: it is out of step."""
        missing = error.missing if isinstance(error, CollectiveError) else ()
        self._liveness.abort(f"the group failed before, in {operation}: {error}", missing)
        self._segment.leave()

    def _count_traffic(self, op: RunningOp, sent: int, received: int) -> None:
        seconds = time.perf_counter() - op.start
        self._meter.add(sent, received, op.waiting_s, seconds - op.waiting_s)

    def _check_parts(self, parts: Sequence[Tensor], own: Tensor) -> None:
        world, rank = self.world, self.rank
        if len(parts) != world or parts[rank].numel() != own.numel():
            sizes = ", ".join(str(part.numel()) for part in parts)
            raise ValueError(
                f"rank {rank} of {world} passed a tensor of {own.numel()} elements with parts of "
                f"{sizes}: pass one part per rank, and part {rank} of equal size"
            )
        if any(part.dtype != own.dtype for part in parts):
            raise ValueError(f"all parts must be {own.dtype}, like the rank's own tensor")

    def _find_segment(self) -> GroupSegment:
        """Create and publish the shared memory on rank 0; find and map it on other ranks."""
        node = ray.get_runtime_context().get_node_id()
        layout = SegmentLayout.of(self.world)
        if self.rank == 0:
            segment = GroupSegment.create(node, layout)
            fields = asdict(segment.segment.address) | {"world": self.world}
            publish_address(self.name, json.dumps(fields).encode())
            return segment
        fields = json.loads(find_address(self.name, self.settings))
        if (world := fields.pop("world")) != self.world:
            raise self._rendezvous_error(
                f"rank 0 expects {world} ranks, rank {self.rank} expects {self.world}"
            )
        address = MemoryAddress(**fields)
        if address.node != node:
            raise self._rendezvous_error(
                f"rank 0 is on node {address.node}, rank {self.rank} on node {node}: "
                "shared memory works inside a node; choose `backend: hierarchical` or `gloo`"
            )
        try:
            return GroupSegment.open(address, layout, self.rank)
        except OSError as error:
            raise self._rendezvous_error(
                f"rank {self.rank} on node {node} cannot open the memory of rank 0 (process "
                f"{address.pid} on node {address.node}): {error}; rank 0 is gone, or the two run "
                "in different containers or as different users: then choose `backend: gloo`"
            ) from error

    def _rendezvous_error(self, cause: str) -> CollectiveError:
        return CollectiveError(self.name, "rendezvous", 0, (0,), cause)


def to_host(tensor: Tensor) -> Tensor:
    """
    Return a contiguous tensor as a CPU vector: a view, or for CUDA a copy in pinned memory.

    Raises:
        TypeError: tensors of this dtype cannot be exchanged.
        ValueError: the tensor is not contiguous.
    """
    if not supported(tensor.dtype):
        raise TypeError(f"shared memory does not support {tensor.dtype} tensors")
    if not tensor.is_contiguous():
        raise ValueError("a collective operation needs a contiguous tensor")
    flat = tensor.detach().view(-1)
    if tensor.is_cuda:
        copy = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        return copy.copy_(flat)
    return flat


def copy_back(flat: Tensor, tensor: Tensor) -> None:
    """Copy a result on the host to its CUDA tensor; a CPU tensor shares memory with `flat`."""
    if tensor.is_cuda:
        tensor.copy_(flat.view(tensor.shape))
