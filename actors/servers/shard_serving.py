"""
Implementation of a server node of one shard: transfer of gradients and parameters.

Each worker's calls run on a thread of their own. `strategies/server/server.py` decides what they
wait for and when a gradient is applied. Gradients and parameters of workers on this node go through
shared memory, those of other workers as bytes.

At the start of a run each node's update rate is measured, and shard sizes are chosen accordingly.
An update sums the ranks' gradients and runs the optimizer, both element by element, so a small
vector is representative of a large one. Only the ratio between servers matters.
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
_MAX_GRADIENTS = 8


def elements_per_s(
    job: Job, world: int, dtype: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """
    Measure the number of elements that this process updates per second.

    Args:
        job: names the optimizer.
        world: gradients of a step.
        dtype: of the parameters, by torch's name.
        clock: returns seconds.
    """
    params = torch.zeros(_ELEMENTS, dtype=getattr(torch, dtype))
    total = torch.zeros_like(params)
    gradients = [torch.full_like(params, 0.5) for _ in range(min(world, _MAX_GRADIENTS))]
    optimizer = FlatOptimizer(job.optimizer, params, total)
    durations = []
    for step in range(_ROUNDS):
        start = clock()
        sum_in_order(gradients, total)
        optimizer.step(rate_of(job, step, _ROUNDS))
        durations.append(clock() - start)
    # The first round includes page faults.
    return _ELEMENTS / max(1e-9, statistics.median(durations[1:]))


class ShardServing(Serving[ShardServer]):
    """
    Implementation of a server node that stores a shard.

    Args:
        name: of the actor, for messages.
        transport: for calls to other actors.
    """

    def __init__(self, name: str, transport: Transport) -> None:
        super().__init__(name, transport)
        self._gradients: dict[
            int, Tensor
        ] = {}  #: rank -> its gradient of this shard, shared memory
        self._parameters: dict[int, Tensor] = {}  #: rank -> its copy of the shard, shared memory
        self._segment: MemorySegment | None = None
        self._published: tuple[int, Any] | None = None  #: version, and reference of its bytes
        #: rank -> number of its last `attach`, and whether it shares memory
        self._attached: dict[int, tuple[tuple[int, int], bool]] = {}
        self._listening: dict[
            int, object
        ] = {}  #: rank -> token of the call that serves its mailbox
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
        Assign this server its shard, once; return the address of its segment of `total` elements.

        Args:
            plan: the run's facts.
            shard: range of the flat vector.
            total: elements of the whole vector.
            dtype: of the vector.
            parameters: this node's parameter segment, if another server has created it.
            role: whether this server serves the shard or is a backup.
        """
        if self._segment is not None:
            return self._segment.address
        if parameters is None:
            # A replicated shard has its own segment, in which only the shard's pages are touched.
            segment = MemorySegment.create(self._node, total, dtype, populate=role is Role.ALONE)
        else:
            segment = MemorySegment.open(parameters)
        self._plan, self._cut, self._settings = plan, shard, plan.settings
        limits = ServerLimits(plan.job.failure.start_timeout_s, plan.job.failure.step_timeout_s)
        self._server = ShardServer(self._name, plan, limits, self._shard_of(segment))
        store, transport = self._server.store, self._transport
        self._replication = Replication(self._name, transport, role, store, limits.step_s)
        if role is not Role.ALONE:
            store.backup_link = self._replication
        self._segment = segment
        extent = shard.index, shard.start, shard.stop, total
        logger.info("shard %d: parameters %d..%d of %d", *extent)
        return segment.address

    @property
    @override
    def server(self) -> ShardServer | None:
        return self._server if self._segment is not None else None

    @override
    def held(self) -> ServerReport:
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
        base: tuple[int, NDArray[np.uint8]] | None,
    ) -> AttachReply:
        """
        Map a worker's segments. The first call of a later attempt starts it at this shard.

        Args:
            rank: of the worker.
            number: attempt, and number of this call in the attempt; late calls have no effect.
            world: workers that share this shard in this attempt.
            gradients: the worker's gradient segment; None: the worker is on another node.
            parameters: the worker's parameter segment, if it computes on a copy.
            base: after a failover: version and bytes of the shard on which the worker computes.
        """
        store = self._server.store

        def change() -> AttachReply:
            last, shares_memory = self._attached.get(rank, ((-1, -1), False))
            if number > last:
                shares_memory = self._map(rank, gradients, parameters)
                self._attached[rank] = number, shares_memory
                self._begin(number[0], world)
                self._server.forget_push_reply(rank)
                if base is not None:
                    values = from_bytes(base[1], store.params.dtype)
                    store.record_pull(rank, base[0], values)
            return AttachReply(shares_memory, store.ledger.version)

        return self._server.exclusively(change)

    def _begin(self, attempt: int, world: int) -> None:
        """Start an attempt unless it has started; unmap the memory of workers that have left."""
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
                self._parameters[rank] = self._shard_of(MemorySegment.open(parameters))
            self._gradients[rank] = self._shard_of(MemorySegment.open(gradients))
        except OSError:
            self._parameters.pop(rank, None)
            return False
        return True

    def restore(
        self, version: int, values: NDArray[np.uint8] | None, state: Mapping[str, RawTensor]
    ) -> None:
        """
        Load parameters and optimizer state, and start to serve.

        Args:
            version: number of steps applied to the parameters.
            values: the parameters' bytes; None: they are in the node's or rank 0's segment.
            state: of the optimizer, by torch's names.
        """

        def fill(params: Tensor) -> None:
            if values is not None:
                params.copy_(from_bytes(values, params.dtype))
            elif 0 in self._parameters:
                params.copy_(self._parameters[0])

        tensors = {
            name: tensor_of(raw, TensorSlice(raw.shape)).view(raw.shape)
            for name, raw in state.items()
        }
        self._server.restore(version, fill, tensors)

    def kept(self, version: int, limit_s: float) -> ShardCopy:
        """Return the checkpoint copy of a version, as an object reference. See `Server.kept`."""
        copy = shard_copy(self._cut.start, self._server, version, limit_s)
        if copy.ref is None:
            return copy
        return replace(copy, ref=[self._transport.put([as_array(tensor) for tensor in copy.ref])])

    def earlier(self, version: int) -> NDArray[np.uint8]:
        """Return the parameters of the previous version, as bytes; see `DenseStore.values`."""

        def copy() -> NDArray[np.uint8]:
            return as_bytes(self._server.store.values(version).clone())

        return self._server.exclusively(copy)

    def pull(self, pull: PullId) -> ServerReply:
        """Return the newest parameters; see `Server.pull`."""
        self._replication.state.check_serves()
        return self._server.pull(pull, self._deliver(pull.rank))

    def push(
        self, push: PushId, values: NDArray[np.uint8] | None, control: NDArray[np.float64]
    ) -> ServerReply:
        """
        Receive a gradient; see `Server.push`.

        Args:
            push: identity of the push.
            values: bytes of the gradient; None: it is in the worker's segment.
            control: the worker's control record.
        """
        self._replication.state.check_serves()
        gradient = self._gradients[push.rank] if values is None else self._received(values)
        record = StepControl.unpack(control, self._settings)
        return self._server.push(push, gradient, record, self._deliver(push.rank))

    def speed(self, job: Job, world: int, dtype: str) -> float:
        """Measure the number of elements that this server updates per second."""
        return elements_per_s(job, world, dtype)

    def seen(self) -> NDArray[np.bool_]:
        """Return which parameters have had a gradient on any rank, by slot of the shard."""
        store = self._server.store
        return self._server.exclusively(lambda: store.seen)

    def settings(self) -> tuple[float, ...]:
        """Return the settings sent with the pushes of the last step; see `Shards.settings`."""
        self._replication.state.check_serves()
        store = self._server.store
        return self._server.exclusively(lambda: store.settings)

    def left_out(self) -> bool:
        """Return whether the last step was skipped; see `Shards.left_out`."""
        self._replication.state.check_serves()
        store = self._server.store
        return self._server.exclusively(lambda: store.skipped)

    def average(self) -> NDArray[np.uint8]:
        """Return the average of the parameters, as bytes; see `Shards.average`."""
        self._replication.state.check_serves()
        optimizer = self._server.store.optimizer
        return self._server.exclusively(lambda: as_bytes(optimizer.average.clone()))

    def optimizer_state(self) -> dict[str, RawTensor]:
        """Return the optimizer state of this shard; see `LoopShards`."""
        optimizer = self._server.store.optimizer

        def copy() -> dict[str, RawTensor]:
            return {name: whole_of(value.clone()) for name, value in optimizer.state().items()}

        return self._server.exclusively(copy)

    def leave(self, rank: int) -> int:
        """Expect no more pushes of a rank; return the number of active ranks. See `LoopShards`."""
        ledger = self._server.store.ledger

        def count() -> int:
            ledger.finished_ranks.add(rank)
            return ledger.world - len(ledger.finished_ranks)

        return self._server.exclusively(count)

    def commit(self, rank: int, seq: int, norm: float | None) -> ServerReply:
        """Apply a staged step; see `Server.commit`."""
        self._replication.state.check_serves()
        return self._server.commit(rank, seq, norm, self._deliver(rank))

    @override
    def _promoted(self, term: int) -> MemoryAddress:
        assert self._segment is not None, "only a server with a shard is promoted"
        logger.info("shard %d is served here now, term %d", self._cut.index, term)
        return self._segment.address

    def listen(
        self, run: str, attempt: int, rank: int, mailboxes: MemoryAddress, slot: int, control: int
    ) -> None:
        """Serve a worker's mailbox until the worker ends or calls this method again."""
        listener, token = Listener(mailboxes, slot, control), object()
        with self._turn:
            self._listening[rank] = token

        def is_current() -> bool:
            return self._listening.get(rank) is token

        def handle(request: MailboxRequest) -> ServerReply:
            if not is_current():
                raise FencedError(f"{self._name} does not listen here any more")
            if request.norm is not None:
                return self.commit(rank, request.seq, request.norm)
            push = PushId(run, attempt, rank, request.seq, request.task)
            return self.push(push, None, listener.control())

        try:
            listener.serve(handle, self._turn, is_current)
        finally:
            listener.close()

    @override
    def close(self) -> None:
        """Stop serving mailboxes, and seal the segment; the end of the process does the same."""
        with self._turn:
            self._listening.clear()
        if self._segment is not None:
            self._segment.seal()

    def _deliver(self, rank: int) -> Deliver:
        """Return the function that delivers values to a worker, with the server's lock held."""

        def deliver(values: Tensor, version: int) -> list[object] | None:
            if rank in self._parameters:
                self._parameters[rank].copy_(values)
            if rank in self._gradients:
                return None
            return [self._publish(values, version)]  # Ray resolves references outside of lists

        return deliver

    def _publish(self, values: Tensor, version: int) -> Any:
        """Put a version's bytes into the object store, once for all workers."""
        if self._published is None or self._published[0] != version:
            # `put` copies, so the shard may update its vector afterwards.
            reference = self._transport.put(as_bytes(as_type(values, self._plan.wire)))
            self._published = version, reference
        return self._published[1]

    def _shard_of(self, segment: MemorySegment) -> Tensor:
        return segment.tensor[self._cut.start : self._cut.stop]

    def _received(self, values: NDArray[np.uint8]) -> Tensor:
        """Return a gradient from another node in the parameters' dtype."""
        dtype, wire = self._server.params.dtype, self._plan.wire
        return from_bytes(values, dtype if wire is None else getattr(torch, wire)).to(dtype)
