"""
A group of ranks on one node, which exchange through shared memory.

Rank 0 makes the memory and leaves its address with Ray; the others map it. All else happens in the
memory itself, signalled by futexes: no server, no sockets, no copies through the kernel.
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

from distplat.actors.collectives.group import CollectiveGroup, summed
from distplat.actors.collectives.header import STAGED, Header, header, supported
from distplat.actors.collectives.rendezvous import (
    GIVEN_UP,
    GroupMember,
    find_address,
    publish_address,
    wait_for_all,
    withdraw_address,
)
from distplat.actors.collectives.shm.communicator import Bytes, ShmCommunicator
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
    One rank of a group on one node; tensors are on the CPU or on CUDA.

    After an operation failed, all later ones fail, and the other ranks are told.

    Args:
        member: which rank, of which group; all are on one node.
        segment: the memory, where the ranks found each other without Ray.

    Raises:
        DeadlineExceeded: somebody did not come in `settings.rendezvous_s`.
        CollectiveError: the memory cannot be reached, or `settings.abandoned` was set.
    """

    def __init__(self, member: GroupMember, *, segment: GroupSegment | None = None) -> None:
        super().__init__(member)
        name, settings, by_ray = member.name, member.settings, segment is None
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
            if by_ray and self.rank == 0:
                withdraw_address(name)
        self._segment.segment.seal()  # nobody else comes in
        self._liveness.start()

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self._run(header("barrier"), self._communicator.barrier)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Combine in place."""
        self._queue.run(partial(self._all_reduce, tensor, op))

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        """Begin to combine in place; any number may be under way."""
        if tensor.is_cuda:  # the group's thread does not know what stream fills it
            torch.cuda.current_stream(tensor.device).synchronize()
        return self._queue.submit(partial(self._all_reduce, tensor, op))

    def _all_reduce(self, tensor: Tensor, op: ReduceOp) -> None:
        flat = on_host(tensor)
        offset = self._vectors.offset(flat)
        combine = self._communicator.all_reduce
        work = partial(combine, flat, summed(op), shared=offset != STAGED)
        self._perform(header("all_reduce", [flat], op, offset=offset), work)
        give_back(flat, tensor)
        self._average(tensor, op)

    def reduce(self, tensor: Tensor, op: ReduceOp, root: int) -> None:
        """Combine into the root's tensor; the others' stay as they are."""
        flat = on_host(tensor)
        offset = self._vectors.offset(flat)
        work = partial(self._communicator.reduce, flat, op, root, shared=offset != STAGED)
        self._run(header("reduce", [flat], op, root=root, offset=offset), work)
        give_back(flat, tensor)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Copy the source's tensor to all."""
        flat = on_host(tensor)
        offset = self._vectors.offset(flat)
        work = partial(self._communicator.broadcast, flat, source, shared=offset != STAGED)
        self._run(header("broadcast", [flat], root=source, offset=offset), work)
        give_back(flat, tensor)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """Copy every rank's tensor to all; sizes may be uneven."""
        flat, parts = on_host(tensor), [on_host(output) for output in outputs]
        self._check_parts(parts, flat)
        offsets = self._vectors.offsets(parts)
        work = partial(self._communicator.all_gather, parts, flat, shared=bool(offsets))
        self._run(header("all_gather", parts, offsets=offsets), work)
        for part, output in zip(parts, outputs, strict=True):
            give_back(part, output)

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """Combine everybody's r-th input into the output of rank r; sizes may be uneven."""
        flat, parts = on_host(output), [on_host(part) for part in inputs]
        self._check_parts(parts, flat)
        offsets = self._vectors.offsets(parts)
        combine = self._communicator.reduce_scatter
        work = partial(combine, flat, parts, summed(op), shared=bool(offsets))
        self._run(header("reduce_scatter", parts, op, offsets=offsets), work)
        give_back(flat, output)
        self._average(output, op)

    def share(self, like: Tensor) -> Tensor:
        """Give a vector of zeros like `like` that the other ranks have mapped, too."""
        if like.device.type != "cpu":
            return torch.zeros_like(like)
        segment, tensor = create_vector(like)
        try:
            work = partial(self._communicator.share, segment)
            self._run(header("share", [tensor]), work)
        finally:
            segment.seal()
        return tensor

    def start_send(self, tensor: Tensor, to: int) -> Work:
        """Hand a tensor to rank `to`; waits for it only if two are untaken."""
        flat = on_host(tensor)
        self._account(self._message(partial(self._messages.send, flat, to)), flat.nbytes, 0)
        return Work()

    def recv(self, tensor: Tensor, source: int) -> None:
        """Fill a tensor with the next one of rank `source`."""
        flat = on_host(tensor)
        self._account(self._message(partial(self._messages.receive, flat, source)), 0, flat.nbytes)
        give_back(flat, tensor)

    def _abort(self) -> None:
        self._liveness.give_up(GIVEN_UP)

    def _leave(self) -> None:
        """Leave the group once its messages are received; waits for this rank fail soon."""
        self._messages.drain()
        self._liveness.give_up("this rank has left the group")
        self._segment.leave()
        self._segment.segment.seal()
        self._queue.close(_CLOSE_S)
        self._messages.close()
        self._liveness.close()

    def _run(self, head: Header, work: Callable[[], Bytes]) -> None:
        """Run one operation in its turn; return when it is over."""
        self._queue.run(partial(self._perform, head, work))

    def _perform(self, head: Header, work: Callable[[], Bytes]) -> None:
        """Run one operation now, as the next one of the group."""
        number = self._number
        running = RunningOp(head.name, number)
        self._liveness.check(running)
        self._number += 1
        self._communicator.begin(head, running)
        try:
            sent, received = work()
        except BaseException as error:
            self._break(error, f"{head.name} #{number}")
            raise
        self._account(running, sent, received)

    def _message(self, work: Callable[[], RunningOp]) -> RunningOp:
        try:
            return work()
        except BaseException as error:
            self._break(error, "a message")
            raise

    def _break(self, error: BaseException, operation: str) -> None:
        """Make the other ranks' waits for this one fail: it is out of step."""
        missing = error.missing if isinstance(error, CollectiveError) else ()
        self._liveness.give_up(f"the group failed before, in {operation}: {error}", missing)
        self._segment.leave()

    def _account(self, op: RunningOp, sent: int, received: int) -> None:
        seconds = time.perf_counter() - op.began
        self._meter.add(sent, received, op.waited, seconds - op.waited)

    def _check_parts(self, parts: Sequence[Tensor], own: Tensor) -> None:
        world, rank = self.world, self.rank
        if len(parts) != world or parts[rank].numel() != own.numel():
            sizes = ", ".join(str(part.numel()) for part in parts)
            raise ValueError(
                f"rank {rank} of {world} gave a tensor of {own.numel()} elements "
                f"with parts of {sizes}: one part per rank is needed, the own one of equal size"
            )
        if any(part.dtype != own.dtype for part in parts):
            raise ValueError(f"all parts must be {own.dtype}, like the rank's own tensor")

    def _find_segment(self) -> GroupSegment:
        """Make the memory as rank 0 and say where it is; or find it, and map it."""
        node = ray.get_runtime_context().get_node_id()
        layout = SegmentLayout.of(self.world)
        if self.rank == 0:
            segment = GroupSegment.create(node, layout)
            word = asdict(segment.segment.address) | {"world": self.world}
            publish_address(self.name, json.dumps(word).encode())
            return segment
        word = json.loads(find_address(self.name, self.settings))
        if (world := word.pop("world")) != self.world:
            raise self._no_segment(f"rank 0 says {world} ranks, rank {self.rank} says {self.world}")
        address = MemoryAddress(**word)
        if address.node != node:
            raise self._no_segment(
                f"rank 0 is on node {address.node}, rank {self.rank} on node {node}: "
                "shared memory works inside a node; choose `backend: hierarchical` or `gloo`"
            )
        try:
            return GroupSegment.open(address, layout, self.rank)
        except OSError as error:
            raise self._no_segment(
                f"rank {self.rank} on node {node} cannot open the memory of rank 0 (process "
                f"{address.pid} on node {address.node}): {error}; rank 0 is gone, or the two run "
                "in different containers or as different users: then choose `backend: gloo`"
            ) from error

    def _no_segment(self, cause: str) -> CollectiveError:
        return CollectiveError(self.name, "rendezvous", 0, (0,), cause)


def on_host(tensor: Tensor) -> Tensor:
    """
    Give a contiguous tensor as a vector on the CPU: the same memory, or for CUDA a pinned copy.

    Raises:
        TypeError: tensors of this dtype cannot be exchanged.
        ValueError: the tensor is not contiguous.
    """
    if not supported(tensor.dtype):
        raise TypeError(f"shared memory takes no {tensor.dtype} tensors")
    if not tensor.is_contiguous():
        raise ValueError("a collective operation needs a contiguous tensor")
    flat = tensor.detach().view(-1)
    if tensor.is_cuda:
        copy = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        return copy.copy_(flat)
    return flat


def give_back(flat: Tensor, tensor: Tensor) -> None:
    """Bring a result that was made on the host to where the tensor lives."""
    if tensor.is_cuda:
        tensor.copy_(flat.view(tensor.shape))
