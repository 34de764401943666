"""
A server node at work: one shard, and the ways by which gradients come and parameters go.

Calls come in on one thread per worker; what they wait for, and what is applied when, is the
server's (`strategies/server/server.py`). Payload goes by shared memory to and from workers of
this node, as bytes to and from others.

How fast a node makes updates is measured when a run begins, to cut its shard accordingly. What
takes a shard's time is adding up the ranks' gradients and the optimizer, both element by element,
so a small vector tells of a large one. Only the proportion between servers counts.
"""

import logging
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from distplat.actors.memory.mailboxes import Listener, MailboxRequest
from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import AttachReply, MemoryAddress
from distplat.actors.servers.replication import Replication
from distplat.actors.servers.serving import Serving
from distplat.actors.servers.vector_transport import as_bytes, as_type, from_bytes
from distplat.actors.transport import Transport
from distplat.platform.errors import FencedError
from distplat.platform.ledger import PullId, PushId, ServerReply
from distplat.platform.server_group import Role, ServerReport
from distplat.platform.shard_map import Shard, ShardPlan
from distplat.platform.spec import Job
from distplat.platform.tensor_slices import RawTensor, TensorSlice
from distplat.strategies.algorithms.reduce import sum_in_order
from distplat.strategies.checkpoint.checkpoint_reader import tensor_of
from distplat.strategies.checkpoint.parts import as_array, whole_of
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.optim import FlatOptimizer, rate_of
from distplat.strategies.ports import ShardCopy
from distplat.strategies.server.answers import shard_copy
from distplat.strategies.server.server import Deliver, ServerLimits, ShardServer

logger = logging.getLogger(__name__)

_ELEMENTS = 1 << 18
_ROUNDS = 7
_MOST_GRADIENTS = 8


def elements_per_s(
    job: Job, world: int, dtype: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """
    Measure how many elements of a shard this process updates in a second.

    Args:
        job: names the optimizer.
        world: gradients of a step.
        dtype: of the parameters, by torch's name.
        clock: gives seconds.
    """
    params = torch.zeros(_ELEMENTS, dtype=getattr(torch, dtype))
    total = torch.zeros_like(params)
    gradients = [torch.full_like(params, 0.5) for _ in range(min(world, _MOST_GRADIENTS))]
    optimizer = FlatOptimizer(job.optimizer, params, total)
    seconds = []
    for step in range(_ROUNDS):
        began = clock()
        sum_in_order(gradients, total)
        optimizer.step(rate_of(job, step, _ROUNDS))
        seconds.append(clock() - began)
    return _ELEMENTS / max(1e-9, statistics.median(seconds[1:]))  # the first touches new memory


class ShardServing(Serving[ShardServer]):
    """
    The body of a server node that keeps a shard.

    Args:
        name: of the actor, for messages.
        transport: its way to other actors.
    """

    def __init__(self, name: str, transport: Transport) -> None:
        super().__init__(name, transport)
        self._gradients: dict[int, Tensor] = {}  #: rank -> its part of this shard, shared memory
        self._parameters: dict[int, Tensor] = {}  #: the same of workers that compute on a copy
        self._segment: MemorySegment | None = None
        self._published: tuple[int, Any] | None = None  #: version, and where its bytes are
        self._attached: dict[int, tuple[tuple[int, int], bool]] = {}  #: rank -> its call, near
        self._listening: dict[int, object] = {}  #: rank -> the call that answers its mailbox
        self._turn = threading.Lock()  #: see `Listener.serve`

    def assign(
        self,
        plan: ShardPlan,
        shard: Shard,
        total: int,
        dtype: str,
        parameters: MemoryAddress | None,
        role: Role,
    ) -> MemoryAddress:
        """
        Take over a shard, once; give the address of the node's segment, of `total` elements.

        Args:
            plan: the run's facts.
            shard: which run of the flat vector.
            total: elements of the whole vector.
            dtype: its type.
            parameters: this node's parameter segment, if another server has made it.
            role: whether it serves the shard, or keeps up with who does.
        """
        if self._segment is not None:
            return self._segment.address
        if parameters is None:
            # A shard that is kept twice has a segment of its own, of which the rest is not touched.
            segment = MemorySegment.create(self._node, total, dtype, populate=role is Role.ALONE)
        else:
            segment = MemorySegment.open(parameters)
        self._plan, self._cut, self._settings = plan, shard, plan.settings
        limits = ServerLimits(plan.job.failure.start_timeout_s, plan.job.failure.step_timeout_s)
        self._server = ShardServer(self._name, plan, limits, self._mine(segment))
        store, transport = self._server.store, self._transport
        self._replication = Replication(self._name, transport, role, store, limits.step_s)
        if role is not Role.ALONE:
            store.backup_link = self._replication
        self._segment = segment
        which = shard.index, shard.start, shard.stop, total
        logger.info("shard %d: parameters %d..%d of %d", *which)
        return segment.address

    @property
    @override
    def server(self) -> ShardServer | None:
        """None: no shard was assigned yet."""
        return self._server if self._segment is not None else None

    @override
    def held(self) -> ServerReport:
        """The manager knows this server's name."""
        if self._segment is None:
            return ServerReport(self._name, None)
        return self._replication.held(self._plan.number, self._cut)

    def attach(
        self,
        rank: int,
        number: tuple[int, int],
        world: int,
        gradients: MemoryAddress | None,
        parameters: MemoryAddress | None,
        held: tuple[int, NDArray[np.uint8]] | None,
    ) -> AttachReply:
        """
        Map a worker's segments. The first one of a later attempt begins it at this shard.

        Args:
            rank: of the worker.
            number: attempt, and number of this call in it: what comes late does nothing.
            world: workers that share this shard in this attempt.
            gradients: its segment; None: it cannot be reached, the worker knows.
            parameters: the same, of a worker that computes on a copy.
            held: version and bytes of this shard's values that it computes on, where that counts.
        """
        store = self._server.store

        def change() -> AttachReply:
            last, shares_memory = self._attached.get(rank, ((-1, -1), False))
            if number > last:
                shares_memory = self._map(rank, gradients, parameters)
                self._attached[rank] = number, shares_memory
                self._begin(number[0], world)
                self._server.forget_push_reply(rank)
                if held is not None:
                    values = from_bytes(held[1], store.params.dtype)
                    store.record_pull(rank, held[0], values)
            return AttachReply(shares_memory, store.ledger.version)

        return self._server.exclusively(change)

    def _begin(self, attempt: int, world: int) -> None:
        """Begin an attempt, unless it has begun; unmap the memory of workers that left."""
        if self._server.renew(attempt, world) and not self._plan.consistency.dynamic_tasks:
            self._gradients = {r: one for r, one in self._gradients.items() if r < world}
            self._parameters = {r: one for r, one in self._parameters.items() if r < world}

    def _map(
        self, rank: int, gradients: MemoryAddress | None, parameters: MemoryAddress | None
    ) -> bool:
        self._gradients.pop(rank, None)
        self._parameters.pop(rank, None)
        try:
            if gradients is None or gradients.node != self._node:
                return False
            if parameters is not None:
                self._parameters[rank] = self._mine(MemorySegment.open(parameters))
            self._gradients[rank] = self._mine(MemorySegment.open(gradients))
        except OSError:
            self._parameters.pop(rank, None)
            return False
        return True

    def restore(
        self, version: int, values: NDArray[np.uint8] | None, state: Mapping[str, RawTensor]
    ) -> None:
        """
        Open for service.

        Args:
            version: steps that the parameters have behind them.
            values: the parameters' bytes; None: they are in a segment, the node's or rank 0's.
            state: what the optimizer remembers of them, by torch's names.
        """

        def fill(params: Tensor) -> None:
            if values is not None:
                params.copy_(from_bytes(values, params.dtype))
            elif 0 in self._parameters:
                params.copy_(self._parameters[0])

        tensors = {
            name: tensor_of(one, TensorSlice(one.shape)).view(one.shape)
            for name, one in state.items()
        }
        self._server.restore(version, fill, tensors)

    def kept(self, version: int, limit_s: float) -> ShardCopy:
        """Give what was kept of a version, as an object to be fetched. See `Server.kept`."""
        copy = shard_copy(self._cut.start, self._server, version, limit_s)
        if copy.ref is None:
            return copy
        return replace(copy, ref=[self._transport.put([as_array(one) for one in copy.ref])])

    def earlier(self, version: int) -> NDArray[np.uint8]:
        """Give the bytes of the version before the present one; see `DenseStore.values`."""

        def copy() -> NDArray[np.uint8]:
            return as_bytes(self._server.store.values(version).clone())

        return self._server.exclusively(copy)

    def pull(self, pull: PullId) -> ServerReply:
        """Give the newest parameters; see `Server.pull`."""
        self._replication.state.check_serves()
        return self._server.pull(pull, self._deliver(pull.rank))

    def push(
        self, push: PushId, values: NDArray[np.uint8] | None, control: NDArray[np.float64]
    ) -> ServerReply:
        """
        Take a gradient; see `Server.push`.

        Args:
            push: its identity.
            values: its bytes; None: they are in the worker's segment.
            control: the worker's control record.
        """
        self._replication.state.check_serves()
        gradient = self._gradients[push.rank] if values is None else self._received(values)
        record = StepControl.unpack(control, self._settings)
        return self._server.push(push, gradient, record, self._deliver(push.rank))

    def speed(self, job: Job, world: int, dtype: str) -> float:
        """Measure how many elements this server updates in a second."""
        return elements_per_s(job, world, dtype)

    def seen(self) -> NDArray[np.bool_]:
        """Say which parameters have had a gradient yet, on any rank; by slot of the shard."""
        store = self._server.store
        return self._server.exclusively(lambda: store.seen)

    def settings(self) -> tuple[float, ...]:
        """Give what came with the pushes of the last step; see `Shards.settings`."""
        self._replication.state.check_serves()
        store = self._server.store
        return self._server.exclusively(lambda: store.settings)

    def left_out(self) -> bool:
        """Say whether the last step was left out; see `Shards.left_out`."""
        self._replication.state.check_serves()
        store = self._server.store
        return self._server.exclusively(lambda: store.skipped)

    def average(self) -> NDArray[np.uint8]:
        """Give the bytes of the parameters' average; see `Shards.average`."""
        self._replication.state.check_serves()
        optimizer = self._server.store.optimizer
        return self._server.exclusively(lambda: as_bytes(optimizer.average.clone()))

    def optimizer_state(self) -> dict[str, RawTensor]:
        """Give what the optimizer remembers of this shard; see `LoopShards`."""
        optimizer = self._server.store.optimizer

        def copy() -> dict[str, RawTensor]:
            return {name: whole_of(value.clone()) for name, value in optimizer.state().items()}

        return self._server.exclusively(copy)

    def leave(self, rank: int) -> int:
        """Wait for no more pushes of a rank; see `LoopShards`."""
        ledger = self._server.store.ledger

        def count() -> int:
            ledger.finished_ranks.add(rank)
            return ledger.world - len(ledger.finished_ranks)

        return self._server.exclusively(count)

    def commit(self, rank: int, seq: int, norm: float | None) -> ServerReply:
        """Apply a staged step; see `Server.commit`."""
        self._replication.state.check_serves()
        return self._server.commit(rank, seq, norm, self._deliver(rank))

    def _promoted(self, term: int) -> MemoryAddress:
        assert self._segment is not None, "only a server with a shard is promoted"
        logger.info("shard %d is served here now, term %d", self._cut.index, term)
        return self._segment.address

    def listen(
        self, run: str, attempt: int, rank: int, mailboxes: MemoryAddress, slot: int, control: int
    ) -> None:
        """Answer a worker's mailbox as long as it lives; its later call takes over from this."""
        listener, token = Listener(mailboxes, slot, control), object()
        with self._turn:
            self._listening[rank] = token

        def wanted() -> bool:
            return self._listening.get(rank) is token

        def handle(request: MailboxRequest) -> ServerReply:
            if not wanted():
                raise FencedError(f"{self._name} does not listen here any more")
            if request.norm is not None:
                return self.commit(rank, request.seq, request.norm)
            push = PushId(run, attempt, rank, request.seq, request.task)
            return self.push(push, None, listener.control())

        try:
            listener.serve(handle, self._turn, wanted)
        finally:
            listener.close()

    def close(self) -> None:
        """Stop answering mailboxes, and seal the segment; a process's end does as much."""
        with self._turn:
            self._listening.clear()
        if self._segment is not None:
            self._segment.seal()

    def _deliver(self, rank: int) -> Deliver:
        """Say how values get to a worker; called with the server's lock held."""

        def deliver(values: Tensor, version: int) -> list[object] | None:
            if rank in self._parameters:
                self._parameters[rank].copy_(values)
            if rank in self._gradients:
                return None
            return [self._publish(values, version)]  # in a list, or Ray would send the values

        return deliver

    def _publish(self, values: Tensor, version: int) -> Any:
        """Put a version's bytes into the object store, once for all workers."""
        if self._published is None or self._published[0] != version:
            # `put` copies, so the shard may go on and write into its vector.
            reference = self._transport.put(as_bytes(as_type(values, self._plan.wire)))
            self._published = version, reference
        return self._published[1]

    def _mine(self, segment: MemorySegment) -> Tensor:
        return segment.tensor[self._cut.start : self._cut.stop]

    def _received(self, values: NDArray[np.uint8]) -> Tensor:
        """Give a gradient from another node as the optimizer takes it."""
        own, wire = self._server.params.dtype, self._plan.wire
        return from_bytes(values, own if wire is None else getattr(torch, wire)).to(own)
