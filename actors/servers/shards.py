"""Implementation of the port `Shards`: calls by `fan_out.py`, bytes by `vector_transport.py`."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from distplat.actors.memory.device_copy import DirectTransfer, cuda_transfer
from distplat.actors.memory.mailboxes import MailboxRequest
from distplat.actors.messages import AttachReply, Membership, ModelFacts, WorkOrder
from distplat.actors.servers.fan_out import FanOut, FanOutCall, ServerCalls
from distplat.actors.servers.map_watcher import ServerWatch
from distplat.actors.servers.vector_transport import (
    CopyTransport,
    SharedMemoryTransport,
    as_bytes,
    merge_states,
    shard_state,
    shard_view,
)
from distplat.actors.transport import Transport, TransportError
from distplat.platform.errors import ActorLost
from distplat.platform.ledger import PullId, PushId, ServerReply
from distplat.platform.shard_map import Shard, settings_of
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.checkpoint_types import ALL, Holding
from distplat.strategies.loop.control import StepControl, control_size
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.ports import LoopOptimizer, LoopShards, Pushed, ShardCopy, Shards, Vectors
from distplat.strategies.reduction.base import mixed_dtypes_error
from distplat.strategies.server.answers import fetch_copies, merge_push_replies

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class RemoteShards(Shards, LoopShards):
    """
    A worker's client of the server group.

    Args:
        transport: the worker's.
        order: the worker's orders, with the manager's handle.
        total_steps: updates in the run; servers need it for the learning rate.
        checkpoint_every: steps between two checkpoints; 0: checkpoints are disabled.
        abandoned: once set, waits end.
    """

    def __init__(
        self,
        transport: Transport,
        order: WorkOrder,
        total_steps: int,
        checkpoint_every: int,
        abandoned: threading.Event,
    ) -> None:
        self._transport, self._order = transport, order
        self._total_steps, self._plateau = total_steps, order.job.plateau
        self._checkpoint_every = checkpoint_every
        self._limits = order.job.failure
        self._pulls = self._attachments = 0
        self._connected: FanOut | None = None  #: None: not connected yet
        self._watch = ServerWatch[Membership](transport, order.rank, self._limits, abandoned)
        self._versions: dict[int, int] = {}  #: shard -> version of this worker's values
        self._transfer = DirectTransfer()
        self._setting = (
            "start_timeout_s"  #: deadline of a push: the first push is part of the start
        )
        self._settings = 0  #: number of settings sent with each push

    @override
    def connect(
        self, flat: FlatModel, saved: SavedState | None = None, holding: Holding | None = None
    ) -> None:
        """
        Raises:
            SpecError: the job sets a `wire` dtype, and the parameters have several dtypes.
        """
        holding = holding or ALL
        duplicate_ranges, schedule = holding.duplicate_ranges(flat), self._order.job.task_schedule
        state = saved.optimizer(flat, slices=holding.slices) if saved is not None else {}
        self._settings = settings_of(self._order.job)
        self._connect(flat, state, duplicate_ranges=duplicate_ranges, schedule=schedule)

    @override
    def connect_loop(self, vectors: Vectors, loop: LoopOptimizer) -> None:
        self._settings = sum(map(len, loop.own_loop.settings))
        self._connect(vectors, loop.state, own_loop=loop.own_loop)

    def _connect(self, flat: Vectors, state: Mapping[str, Tensor], **more: Any) -> None:
        self._flat = flat
        self._on_device = flat.params.device.type != "cpu"
        self._facts = ModelFacts(
            flat.size,
            str(flat.params.dtype)[6:],
            flat.digest(),
            self._total_steps,
            self._checkpoint_every,
            layout=flat.layout,
            **more,
        )
        manager = [self._order.manager], ["server-manager"]
        calls = ServerCalls(self._transport, self._limits, *manager, self._watch.check)
        join = calls.each("join", self._order.rank, self._facts)
        joined: Membership = calls.start("join", join, setting="start_timeout_s").answers()[0]
        if joined.wire is not None and flat.mixed:
            raise mixed_dtypes_error(flat.layout, "wire")
        self._order = replace(self._order, rank=joined.part_rank)  # servers use part ranks
        if joined.replicated:
            identity = joined.part, joined.part_rank
            ask = partial(self._transport.call, self._order.manager, "follow", *identity)
            self._watch.begin(ask, joined.version)
        self._joined = joined
        self._watch.with_failover(partial(self._attach_and_load, state), self._start_over)

    def _attach_and_load(self, state: Mapping[str, Tensor]) -> None:
        joined = self._joined
        self._load_parameters(self._attach(joined), joined.private, state)

    def _start_over(self, joined: Membership) -> None:
        """Select the servers of a newer map, before any parameters of this worker count."""
        self.close()
        self._versions.clear()
        self._joined = joined

    def close(self) -> None:
        """Release the resources of this attempt."""
        if self._connected is not None:
            self._connected.close()
        self._transfer.close()

    @property
    def _fan_out(self) -> FanOut:
        assert self._connected is not None, "connect() comes first"
        return self._connected

    def _attach(self, joined: Membership) -> list[int | None]:
        """Allocate segments and attach them at all servers; return versions, None if empty."""
        self._connected = fan_out = FanOut(self._transport, self._order, joined, self._watch.check)
        cls = CopyTransport if joined.private else SharedMemoryTransport
        self._vectors = vectors = cls(self._transport, self._facts, joined)
        world = joined.part_world or self._order.job.scaling.world
        identity = self._order.rank, (self._order.attempt, self._attachments), world
        self._attachments += 1
        candidates = vectors.candidates()

        def attach(server: Any, cut: Shard) -> Any:
            gradients = vectors.gradient_address if cut.index in candidates else None
            base = None
            if joined.private and cut.index in self._versions:  # after a failover
                values = shard_view(self._flat.params, cut).cpu()
                base = self._versions[cut.index], as_bytes(values.clone())
            segments = gradients, vectors.parameter_address
            return self._transport.call(server, "attach", *identity, *segments, base)

        answers: list[AttachReply] = fan_out.ask("attach", attach)
        vectors.open({index for index, answer in enumerate(answers) if answer.shares_memory})
        parameters = self._flat.layout.parameters
        fan_out.open_mailboxes(vectors.local_shards, control_size(parameters, self._settings))
        if self._on_device:
            on_host = vectors.gradients, vectors.parameters
            self._transfer = cuda_transfer(self._flat.grads, self._flat.params, on_host)
        local = sorted(vectors.local_shards)
        remote = [cut.index for cut in fan_out.cuts if cut.index not in vectors.local_shards]
        logger.info("servers reached by shared memory: %s, in calls: %s", local, remote)
        return [answer.version for answer in answers]

    def _load_parameters(
        self, versions: list[int | None], private: bool, state: Mapping[str, Tensor]
    ) -> None:
        """
        Load the servers' parameters; rank 0 initializes servers that have none.

        Args:
            versions: of the servers' parameters, by shard.
            private: whether shards may be at different versions.
            state: initial optimizer state; empty: none.
        """
        vectors = self._vectors
        empty = [cut for cut in self._fan_out.cuts if versions[cut.index] is None]
        if self._order.rank == 0 and empty:
            initial = self._flat.params.cpu()
            for cut in empty:
                if cut.index in vectors.local_shards:
                    vectors.put(cut, initial)
            self._fan_out.ask(
                "restore",
                lambda server, cut: self._transport.call(
                    server,
                    "restore",
                    self._flat.version,
                    vectors.payload(cut, initial, exact=True),
                    shard_state(state, cut),
                ),
                empty,
            )
        answers = self._pull("start_timeout_s")
        self._flat.version = min(answer.done for answer in answers)
        if not private:
            self.step_back(self._flat.version)
        self._adopt_vectors()

    @override
    def step_back(self, version: int) -> None:
        """Also called if a lost server has left some shards of this part one version ahead."""
        self._flat.version = version
        ahead = [cut for cut in self._fan_out.cuts if self._versions[cut.index] > version]
        if not ahead:
            return
        self._vectors.detach()
        call = self._fan_out.each("earlier", version)
        answers = self._fan_out.ask("an earlier version", call, ahead)
        for cut, values in zip(ahead, answers, strict=True):
            as_bytes(shard_view(self._vectors.parameters, cut))[:] = values
        if self._on_device:
            self._flat.params.copy_(self._vectors.parameters)
        self._adopt_vectors()

    def _adopt_vectors(self) -> None:
        """Move the model's parameters and gradients into the transport's vectors."""
        if not self._on_device:
            self._flat.move(self._vectors.parameters, self._vectors.gradients)

    @override
    def one_memory(self) -> bool:
        """False with backups: they would miss what a worker writes into shared memory."""
        return self._vectors.one_copy and not self._on_device and not self._watch.has_backups

    @override
    def push(self, step: int, control: StepControl, task: int | None = None) -> Pushed:
        if self._plateau is not None:
            control = replace(control, settings=np.array(self._plateau.state, np.float64))
        self._control = control
        return self._failover(lambda: self._push(step, task))

    def _push(self, step: int, task: int | None = None) -> Pushed:
        fan_out, vectors, order = self._fan_out, self._vectors, self._order
        record = self._control.pack()
        if fan_out.mailboxes is not None:
            fan_out.mailboxes.control[:] = record
        push = PushId(order.run, order.attempt, order.rank, step, task)

        def call(server: Any, cut: Shard) -> Any:
            gradient = vectors.payload(cut, vectors.gradients)
            return self._transport.call(server, "push", push, gradient, record)

        request = MailboxRequest(step, task=task)
        calls = FanOutCall(fan_out, f"push {step}", call, self._receive, request, self._setting)
        for cut in fan_out.cuts:
            send = partial(calls.send, [cut])
            self._transfer.to_host(shard_view(vectors.gradients, cut), cut.start, send)
        self._transfer.wait(self._limits.step_timeout_s)
        result = self._merged_reply(calls)
        self._setting = "step_timeout_s"
        return result

    @override
    def commit(self, step: int, norm: float) -> Pushed:
        before = self._attachments

        def commit() -> Pushed:
            if self._attachments > before:  # the backup of a lost server has no staged step
                self._push(step)
            call = self._fan_out.each("commit", self._order.rank, step, norm)
            what, request = f"commit {step}", MailboxRequest(step, norm)
            calls = FanOutCall(self._fan_out, what, call, self._receive, request)
            calls.send(self._fan_out.cuts)
            return self._merged_reply(calls)

        return self._failover(commit)

    def _merged_reply(self, calls: FanOutCall) -> Pushed:
        answers = self._answers(calls)
        return merge_push_replies(
            answers, [self._vectors.traffic(cut) for cut in self._fan_out.cuts]
        )

    def _answers(self, calls: FanOutCall) -> list[ServerReply]:
        answers = calls.answers()
        self._transfer.join()
        return answers

    def _receive(self, cut: Shard, answer: ServerReply) -> None:
        """Copy a shard's new values to this worker's parameters, unless they are shared."""
        if not answer.committed:
            return
        self._versions[cut.index] = answer.version
        try:
            self._vectors.receive(cut, answer, self._limits.step_timeout_s)
        except TransportError as error:  # an object is lost with its owner
            cause = f"its answer could not be fetched: {error}"
            raise ActorLost(self._fan_out.names[cut.index], None, cause) from None
        self._transfer.to_device(shard_view(self._vectors.parameters, cut), cut.start)

    @override
    def refresh(self) -> None:
        self._failover(lambda: self._pull("step_timeout_s"))

    @override
    def seen(self) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self._ask(partial(self._ask_first_server, "seen"))
        return mask

    @override
    def settings(self) -> tuple[float, ...]:
        values: tuple[float, ...] = self._ask(partial(self._ask_first_server, "settings"))
        return values

    def _ask_first_server(self, method: str) -> Any:
        return self._fan_out.ask(method, self._fan_out.each(method), self._fan_out.cuts[:1])[0]

    @override
    def left_out(self) -> bool:
        answer: bool = self._ask(partial(self._ask_first_server, "left_out"))
        return answer

    @override
    def average(self) -> Tensor:
        parts = self._ask(lambda: self._fan_out.ask("average", self._fan_out.each("average")))
        vector = torch.zeros_like(self._flat.params, device="cpu")
        for cut, values in zip(self._fan_out.cuts, parts, strict=True):
            as_bytes(shard_view(vector, cut))[:] = values
        return vector.to(self._flat.params.device)

    @override
    def leave(self) -> int:
        active: list[int] = self._fan_out.ask(
            "leave", self._fan_out.each("leave", self._order.rank)
        )
        return max(active)

    @override
    def optimizer_state(self) -> dict[str, Tensor]:
        states = self._fan_out.ask("the optimizer's state", self._fan_out.each("optimizer_state"))
        return merge_states(states, self._fan_out.cuts, self._flat.layout)

    @override
    def copies(self, version: int) -> list[ShardCopy] | None:
        def fetch(cut: Shard, limit_s: float) -> ShardCopy:
            what = f"shards after {version} steps"
            kept = self._fan_out.each("kept", version, limit_s)
            answer: ShardCopy = self._fan_out.ask(what, kept, [cut])[0]
            return answer

        fetches = [partial(fetch, cut) for cut in self._fan_out.cuts]
        return fetch_copies(fetches, version, self._limits.step_timeout_s)

    def _failover(self, action: Callable[[], Result]) -> Result:
        """Call the servers, with failover; see `ServerWatch.with_failover`."""
        return self._watch.with_failover(action, self._reconnect)

    def _ask(self, action: Callable[[], Result]) -> Result:
        """Call the servers, with failover, for answers without parameters: pull them after one."""
        before = self._attachments

        def ask() -> Result:
            result = action()
            if self._attachments > before:
                self._pull("step_timeout_s")
            return result

        return self._failover(ask)

    def _reconnect(self, joined: Membership) -> None:
        """
        Connect to the servers of a newer map; keep the step's gradient.

        The new vector of parameters is empty: the repeated call, or a pull after it, fills it.
        """
        self.close()
        # New memory: a frozen server that wakes up writes only to the old segments.
        self._attach(joined)
        if not self._on_device:
            self._vectors.gradients.copy_(self._flat.grads)
        self._adopt_vectors()

    def _pull(self, setting: str) -> list[ServerReply]:
        """Pull the newest parameters from all servers."""
        pull = PullId(self._order.attempt, self._order.rank, self._pulls)
        self._pulls += 1  # also if this pull fails: the next one must have another number
        what, call = f"pull {pull.number}", self._fan_out.each("pull", pull)
        calls = FanOutCall(self._fan_out, what, call, self._receive, setting=setting)
        calls.send(self._fan_out.cuts)
        return self._answers(calls)
