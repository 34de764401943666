"""
The port `Shards` over Ray: control by actor calls, bytes by the fastest road to each server.

    server on this node    gradients: it maps this worker's segment    parameters: we map its node's
    server elsewhere       gradients: bytes in the call                parameters: one object per
                                                                       version in Ray's store

Where every server is on this node the model lives in the servers' segment itself: a new version
is there when the commit returns, and a node holds one copy of the parameters for all its workers.
"""

import logging
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplat.actors.memory import Segment
from distplat.actors.messages import Membership, ModelFacts, PushReply, WorkOrder
from distplat.platform.errors import ActorLost, DeadlineExceeded
from distplat.platform.ledger import PushId
from distplat.platform.shard_map import Shard
from distplat.strategies.training.flat import FlatModel

logger = logging.getLogger(__name__)

_ANSWER_GRACE_S = 10.0
"""A server times out by itself and says who is missing; only a frozen one needs ours on top."""


class RayShards:
    """
    The server group, seen by one worker.

    Args:
        order: the worker's orders, with the manager's handle.
        total_steps: updates in the run; servers need it for the learning rate.
    """

    def __init__(self, order: WorkOrder, total_steps: int) -> None:
        self._order, self._total_steps = order, total_steps
        self._node: str = ray.get_runtime_context().get_node_id()
        self._committed = False

    def connect(self, flat: FlatModel) -> None:
        """See `Shards`."""
        self._flat = flat
        facts = ModelFacts(flat.size, str(flat.params.dtype)[6:], flat.digest(), self._total_steps)
        manager = self._order.manager
        join = manager.join.remote(self._order.rank, facts)
        joined: Membership = self._ask("the server manager", [join], "start_timeout_s")[0]
        self._servers, self._cuts = joined.servers, joined.shard_map.shards
        self._segments: dict[int, Segment] = {}  #: parameters by shard, where they are in reach
        self._map_parameters(joined)
        self._attach_gradients(facts)
        self._place_buffers(joined)
        near = sorted(self._segments)
        far = [cut.index for cut in self._cuts if cut.index not in self._segments]
        logger.info("servers reached by shared memory: %s, by Ray objects: %s", near, far)
        self._take_over()

    def _map_parameters(self, joined: Membership) -> None:
        opened: dict[str, Segment] = {}
        for index, address in enumerate(joined.parameters):
            if address.node != self._node:
                continue
            try:
                opened[address.node] = opened.get(address.node) or Segment.open(address)
            except OSError:
                continue  # another container on this node: its servers are reached as if far away
            self._segments[index] = opened[address.node]

    def _attach_gradients(self, facts: ModelFacts) -> None:
        """Offer this worker's gradient segment to the servers in reach; keep those that map it."""
        segment = Segment.create(self._node, facts.size, facts.dtype)
        self._gradients = segment.tensor
        near = list(self._segments)
        calls = [self._servers[i].attach.remote(self._order.rank, segment.address) for i in near]
        for index, mapped in zip(near, self._ask("attach", calls), strict=True):
            if not mapped:
                del self._segments[index]
        segment.seal()

    def _place_buffers(self, joined: Membership) -> None:
        """Choose where parameters live, and move the model there (on a GPU it stays; see push)."""
        segments = [self._segments.get(i) for i in range(len(self._servers))]
        first = segments[0]
        self._one_copy = first is not None and all(s is first for s in segments)
        if first is not None and self._one_copy:
            self._parameters = first.tensor
        else:
            self._parameters = torch.zeros_like(self._flat.params, device="cpu")
        self._on_device = self._flat.params.device.type != "cpu"

    def _take_over(self) -> None:
        """Rank 0 fills the servers with its parameters; everybody goes on with the servers'."""
        if self._order.rank == 0:
            initial = self._flat.params.cpu()
            calls = []
            for cut, server in zip(self._cuts, self._servers, strict=True):
                segment = self._segments.get(cut.index)
                if segment is not None:
                    _part(segment.tensor, cut).copy_(_part(initial, cut))
                values = _bytes(_part(initial, cut)) if segment is None else None
                calls.append(server.restore.remote(0, values))
            self._ask("restore", calls)
        calls = [server.pull.remote() for server in self._servers]
        self._fetch(self._ask("pull", calls, "start_timeout_s"))
        if not self._on_device:
            self._flat.move(self._parameters, self._gradients)

    def push(self, step: int) -> float | None:
        """See `Shards`."""
        if self._on_device:
            self._gradients.copy_(self._flat.grads)
        push = PushId(self._order.run, self._order.attempt, self._order.rank, step)
        calls = [
            server.push.remote(push, self._payload(cut))
            for cut, server in zip(self._cuts, self._servers, strict=True)
        ]
        replies = self._ask(f"push {step}", calls)
        self._committed = len(replies) == 1 and replies[0].committed
        if self._committed:
            self._fetch(replies)
        squares = [reply.squared_norm for reply in replies if reply.squared_norm is not None]
        return float(sum(squares) ** 0.5) if len(squares) == len(replies) else None

    def commit(self, step: int, norm: float | None) -> None:
        """See `Shards`. A single shard has committed with the last push: nothing is left to do."""
        if self._committed:
            return
        calls = [
            server.commit.remote(step, norm, cut.index not in self._segments)
            for cut, server in zip(self._cuts, self._servers, strict=True)
        ]
        self._fetch(self._ask(f"commit {step}", calls))

    def _payload(self, cut: Shard) -> NDArray[np.uint8] | None:
        return None if cut.index in self._segments else _bytes(_part(self._gradients, cut))

    def _fetch(self, replies: list[PushReply]) -> None:
        """Bring the parameters here, as far as they are not here already."""
        if not self._one_copy:
            limit = self._order.job.failure.step_timeout_s
            for cut, reply in zip(self._cuts, replies, strict=True):
                mine = _part(self._parameters, cut)
                segment = self._segments.get(cut.index)
                if segment is not None:
                    mine.copy_(_part(segment.tensor, cut))
                elif reply.parameters is not None:
                    values = ray.get(reply.parameters[0], timeout=limit)
                    mine.view(torch.uint8).numpy()[:] = values
        if self._on_device:
            self._flat.params.copy_(self._parameters)

    def _ask(self, what: str, calls: list[Any], setting: str = "step_timeout_s") -> list[Any]:
        """
        Wait for answers of the server group.

        Args:
            what: is asked, for the message.
            calls: to the server nodes, in their order, or one to the manager.
            setting: the field of `failure` that holds the deadline.

        Raises:
            ActorLost, DeadlineExceeded: somebody is gone, or frozen.
            DistplatError: what the server raised.
        """
        limit = getattr(self._order.job.failure, setting) + _ANSWER_GRACE_S
        try:
            answers: list[Any] = ray.get(calls, timeout=limit)
        except ray.exceptions.GetTimeoutError:
            late = ray.wait(calls, num_returns=len(calls), timeout=0)[1]
            names = tuple(f"server-{calls.index(call)}" for call in late)
            raise DeadlineExceeded(what, names, limit, f"failure.{setting}") from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            raise ActorLost("the server group", None, str(error).splitlines()[0]) from None
        return answers


def _part(vector: Tensor, cut: Shard) -> Tensor:
    return vector[cut.start : cut.stop]


def _bytes(vector: Tensor) -> NDArray[np.uint8]:
    """View a CPU tensor as bytes: every dtype travels, numpy's and others."""
    array: NDArray[np.uint8] = vector.view(torch.uint8).numpy()
    return array
