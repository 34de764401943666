"""The port `Shards`: control goes by `fan_out.py`, bytes by `vector_transport.py`."""

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
    joined_state,
    part,
    run_of,
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
    The server group, seen by one worker.

    Args:
        transport: the worker's.
        order: the worker's orders, with the manager's handle.
        total_steps: updates in the run; servers need it for the learning rate.
        checkpoint_every: steps between two checkpoints; 0: there are none.
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
        self._reached: FanOut | None = None  #: None: not connected yet
        self._watch = ServerWatch[Membership](transport, order.rank, self._limits, abandoned)
        self._versions: dict[int, int] = {}  #: shard -> version of its values that are here
        self._transfer = DirectTransfer()
        self._setting = "start_timeout_s"  #: deadline of a push; the first belongs to the start
        self._settings = 0  #: values that come with each push

    @override
    def connect(
        self, flat: FlatModel, saved: SavedState | None = None, holding: Holding | None = None
    ) -> None:
        """
        Raises:
            SpecError: another type is to travel, and the parameters are of several.
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
        who = self._order.rank, self._facts
        manager = [self._order.manager], ["server-manager"]
        calls = ServerCalls(self._transport, self._limits, *manager, self._watch.look)
        join = calls.start("join", calls.each("join", *who), setting="start_timeout_s")
        joined: Membership = join.answers()[0]
        if joined.wire is not None and flat.mixed:
            raise mixed_dtypes_error(flat.layout, "wire")
        self._order = replace(self._order, rank=joined.part_rank)  # as its servers count
        if joined.replicated:
            known = joined.part, joined.part_rank
            ask_map = partial(self._transport.call, self._order.manager, "follow", *known)
            self._watch.begin(ask_map, joined.version)
        self._load_parameters(self._attach(joined), joined.private, state)

    def close(self) -> None:
        """Give up what this attempt needs and the next one does not."""
        if self._reached is not None:
            self._reached.close()
        self._transfer.close()

    @property
    def _fan_out(self) -> FanOut:
        assert self._reached is not None, "connect() comes first"
        return self._reached

    def _attach(self, joined: Membership) -> list[int | None]:
        """Lay out memory, attach it at all servers; give their versions, None of an empty one."""
        self._reached = fan_out = FanOut(self._transport, self._order, joined, self._watch.look)
        kind = CopyTransport if joined.private else SharedMemoryTransport
        self._vectors = vectors = kind(self._transport, self._facts, joined)
        world = joined.part_world or self._order.job.scaling.world
        who = self._order.rank, (self._order.attempt, self._attachments), world
        self._attachments += 1
        candidates = vectors.candidates()

        def attach(server: Any, cut: Shard) -> Any:
            gradients = vectors.gradient_address if cut.index in candidates else None
            held = None
            if joined.private and cut.index in self._versions:  # it has changed servers
                values = part(self._flat.params, cut).cpu()
                held = self._versions[cut.index], as_bytes(values.clone())
            segments = gradients, vectors.parameter_address
            return self._transport.call(server, "attach", *who, *segments, held)

        attached: list[AttachReply] = fan_out.ask("attach", attach)
        vectors.open({index for index, answer in enumerate(attached) if answer.shares_memory})
        parameters = self._flat.layout.parameters
        fan_out.open_mailboxes(vectors.local_shards, control_size(parameters, self._settings))
        if self._on_device:
            shared = vectors.gradients, vectors.parameters
            self._transfer = cuda_transfer(self._flat.grads, self._flat.params, shared)
        local = sorted(vectors.local_shards)
        remote = [cut.index for cut in fan_out.cuts if cut.index not in vectors.local_shards]
        logger.info("servers reached by shared memory: %s, in calls: %s", local, remote)
        return [answer.version for answer in attached]

    def _load_parameters(
        self, versions: list[int | None], private: bool, state: Mapping[str, Tensor]
    ) -> None:
        """
        Go on with the servers' parameters; rank 0 fills the servers that have none.

        Args:
            versions: what the servers have, by shard.
            private: whether shards need not be of one version.
            state: what the optimizer remembers, with which rank 0 began; empty: nothing.
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
                    run_of(state, cut),
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
        """Also where a loss has left some of this part's shards one ahead."""
        self._flat.version = version
        ahead = [cut for cut in self._fan_out.cuts if self._versions[cut.index] > version]
        if not ahead:
            return
        self._vectors.part_ways()
        question = self._fan_out.each("earlier", version)
        earlier = self._fan_out.ask("an earlier version", question, ahead)
        for cut, values in zip(ahead, earlier, strict=True):
            as_bytes(part(self._vectors.parameters, cut))[:] = values
        if self._on_device:
            self._flat.params.copy_(self._vectors.parameters)
        self._adopt_vectors()

    def _adopt_vectors(self) -> None:
        """Move the model's parameters into these vectors."""
        if not self._on_device:
            self._flat.move(self._vectors.parameters, self._vectors.gradients)

    @override
    def one_memory(self) -> bool:
        """A backup would not have what a worker writes."""
        return self._vectors.one_copy and not self._on_device and not self._watch.begun

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

        def question(server: Any, cut: Shard) -> Any:
            gradient = vectors.payload(cut, vectors.gradients)
            return self._transport.call(server, "push", push, gradient, record)

        request = MailboxRequest(step, task=task)
        call = FanOutCall(fan_out, f"push {step}", question, self._take, request, self._setting)
        for cut in fan_out.cuts:
            send = partial(call.send, [cut])
            self._transfer.to_host(part(vectors.gradients, cut), cut.start, send)
        self._transfer.wait(self._limits.step_timeout_s)
        result = self._pushed(call)
        self._setting = "step_timeout_s"
        return result

    @override
    def commit(self, step: int, norm: float) -> Pushed:
        before = self._attachments

        def commit() -> Pushed:
            if self._attachments > before:  # what was staged on a lost server is staged nowhere
                self._push(step)
            question = self._fan_out.each("commit", self._order.rank, step, norm)
            what, request = f"commit {step}", MailboxRequest(step, norm)
            asked = FanOutCall(self._fan_out, what, question, self._take, request)
            asked.send(self._fan_out.cuts)
            return self._pushed(asked)

        return self._failover(commit)

    def _pushed(self, asked: FanOutCall) -> Pushed:
        answers = self._answers(asked)
        return merge_push_replies(
            answers, [self._vectors.traffic(cut) for cut in self._fan_out.cuts]
        )

    def _answers(self, asked: FanOutCall) -> list[ServerReply]:
        answers = asked.answers()
        self._transfer.join()
        return answers

    def _take(self, cut: Shard, answer: ServerReply) -> None:
        """Bring a shard's values here, as far as they are not here already."""
        if not answer.committed:
            return
        self._versions[cut.index] = answer.version
        try:
            self._vectors.take(cut, answer, self._limits.step_timeout_s)
        except TransportError as error:  # with its owner an object is lost, too
            cause = f"its answer could not be fetched: {error}"
            raise ActorLost(self._fan_out.names[cut.index], None, cause) from None
        self._transfer.to_device(part(self._vectors.parameters, cut), cut.start)

    @override
    def refresh(self) -> None:
        self._failover(lambda: self._pull("step_timeout_s"))

    @override
    def seen(self) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self._failover(partial(self._ask_first, "seen"))
        return mask

    @override
    def settings(self) -> tuple[float, ...]:
        values: tuple[float, ...] = self._failover(partial(self._ask_first, "settings"))
        return values

    def _ask_first(self, what: str) -> Any:
        return self._fan_out.ask(what, self._fan_out.each(what), self._fan_out.cuts[:1])[0]

    @override
    def left_out(self) -> bool:
        answer: bool = self._failover(partial(self._ask_first, "left_out"))
        return answer

    @override
    def average(self) -> Tensor:
        parts = self._failover(lambda: self._fan_out.ask("average", self._fan_out.each("average")))
        vector = torch.zeros_like(self._flat.params, device="cpu")
        for cut, values in zip(self._fan_out.cuts, parts, strict=True):
            as_bytes(part(vector, cut))[:] = values
        return vector.to(self._flat.params.device)

    @override
    def leave(self) -> int:
        question = self._fan_out.each("leave", self._order.rank)
        active: list[int] = self._fan_out.ask("leave", question)
        return max(active)

    @override
    def optimizer_state(self) -> dict[str, Tensor]:
        states = self._fan_out.ask("the optimizer's state", self._fan_out.each("optimizer_state"))
        return joined_state(states, self._fan_out.cuts, self._flat.layout)

    @override
    def copies(self, version: int) -> list[ShardCopy] | None:
        def ask_one(cut: Shard, limit_s: float) -> ShardCopy:
            what = f"what {version} steps have come to"
            question = self._fan_out.each("kept", version, limit_s)
            answer: ShardCopy = self._fan_out.ask(what, question, [cut])[0]
            return answer

        asks = [partial(ask_one, cut) for cut in self._fan_out.cuts]
        return fetch_copies(asks, version, self._limits.step_timeout_s)

    def _failover(self, action: Callable[[], Result]) -> Result:
        """Do something with the servers that there are; see `ServerWatch`."""
        return self._watch.following(action, self._reconnect)

    def _reconnect(self, joined: Membership) -> None:
        """Go over to the servers that keep the shards now; the step's gradient comes along."""
        self.close()
        # New memory: a server that was frozen and wakes up writes where nobody looks.
        self._attach(joined)
        if not self._on_device:
            self._vectors.gradients.copy_(self._flat.grads)
        self._adopt_vectors()

    def _pull(self, setting: str) -> list[ServerReply]:
        """Bring the newest parameters."""
        pull = PullId(self._order.attempt, self._order.rank, self._pulls)
        self._pulls += 1  # also where it fails: the next one is not this one again
        what, question = f"pull {pull.number}", self._fan_out.each("pull", pull)
        call = FanOutCall(self._fan_out, what, question, self._take, setting=setting)
        call.send(self._fan_out.cuts)
        return self._answers(call)
