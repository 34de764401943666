"""
A server node at work: one shard behind locks and deadlines, reached by many workers at once.

Calls come in on one thread per worker. A push waits until every rank's push of the step is there;
the thread that brings the last one does the sum, the others sleep on a condition. Payload comes by
shared memory from workers of this node, as bytes in the call from others.
"""

import logging
import threading
from collections.abc import Callable

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplat.actors.logs import log_to_stderr
from distplat.actors.memory import Segment
from distplat.actors.messages import Address, PushReply
from distplat.platform.errors import DeadlineExceeded
from distplat.platform.ledger import PushId
from distplat.platform.shard_map import Shard, ShardPlan
from distplat.strategies.training.shard import ParameterShard

logger = logging.getLogger(__name__)


class Serving:
    """
    The body of a server node.

    Args:
        name: of the actor, for messages.
        node: Ray's id of the node it runs on.
    """

    def __init__(self, name: str, node: str) -> None:
        self._name, self._node = name, node
        self._changed = threading.Condition()
        self._gradients: dict[int, Tensor] = {}  #: rank -> its part of this shard, shared memory

    def assign(
        self, plan: ShardPlan, shard: Shard, total: int, dtype: str, parameters: Address | None
    ) -> Address:
        """
        Take over a shard.

        Args:
            plan: the run's facts.
            shard: which run of the flat vector.
            total: elements of the whole vector.
            dtype: its type.
            parameters: this node's parameter segment, if another server has made it.

        Returns:
            Address of the node's parameter segment, of `total` elements.
        """
        if parameters is None:
            self._segment = Segment.create(self._node, total, dtype)
        else:
            self._segment = Segment.open(parameters)
        self._plan, self._cut = plan, shard
        self._shard = ParameterShard(plan, self._segment.tensor[shard.start : shard.stop])
        log_to_stderr()
        logger.info(
            "shard %d: parameters %d..%d of %d", shard.index, shard.start, shard.stop, total
        )
        return self._segment.address

    def attach(self, rank: int, gradients: Address) -> bool:
        """Map a worker's gradient segment; False: it cannot be reached, send bytes instead."""
        if gradients.node != self._node:
            return False
        try:
            segment = Segment.open(gradients)
        except OSError:
            return False
        self._gradients[rank] = segment.tensor[self._cut.start : self._cut.stop]
        return True

    def restore(self, version: int, values: NDArray[np.uint8] | None) -> None:
        """Open for service; `values` None: they are in the segment already."""
        with self._changed:
            if values is not None:
                self._shard.params.copy_(self._from_bytes(values))
            self._shard.restore(version)
            self._changed.notify_all()

    def pull(self) -> PushReply:
        """Give the parameters, once there are any."""
        with self._changed:
            self._wait(
                lambda: self._shard.ledger.version is not None,
                f"parameters of {self._name}",
                lambda: ("worker-0",),
                "start_timeout_s",
            )
            return self._reply(by_bytes=True)

    def push(self, push: PushId, values: NDArray[np.uint8] | None) -> PushReply:
        """
        Stage a worker's gradient; return when those of all ranks are here.

        Args:
            push: identity.
            values: the gradient's bytes; None: it is in the worker's segment.

        Raises:
            ProtocolError: the push must not be applied.
            DeadlineExceeded: somebody's push did not come; names who.
        """
        with self._changed:
            gradient = self._gradients[push.rank] if values is None else self._from_bytes(values)
            self._shard.push(push, gradient)
            ledger = self._shard.ledger
            if ledger.complete:
                if self._shard.commits_alone:
                    norm = self._shard.squared_norm
                    self._shard.commit(push.seq, None if norm is None else norm**0.5)
                self._changed.notify_all()
            self._wait(
                lambda: self._shard.version > push.seq or ledger.complete,
                f"push {push.seq} to {self._name}",
                lambda: tuple(f"worker-{rank}" for rank in ledger.missing()),
                "step_timeout_s",
            )
            return self._reply(by_bytes=values is not None)

    def commit(self, seq: int, norm: float | None, by_bytes: bool) -> PushReply:
        """Apply a staged step, once; later calls get the same answer."""
        with self._changed:
            self._shard.commit(seq, norm)
            return self._reply(by_bytes)

    def _wait(
        self,
        arrived: Callable[[], bool],
        what: str,
        missing: Callable[[], tuple[str, ...]],
        setting: str,
    ) -> None:
        limit: float = getattr(self._plan.job.failure, setting)
        if not self._changed.wait_for(arrived, limit):
            raise DeadlineExceeded(what, missing(), limit, f"failure.{setting}")

    def _reply(self, by_bytes: bool) -> PushReply:
        version = self._shard.version
        committed = not self._shard.ledger.complete
        parameters = [self._published(version)] if by_bytes and committed else None
        return PushReply(self._shard.squared_norm, committed, parameters)

    def _published(self, version: int) -> "ray.ObjectRef[NDArray[np.uint8]]":
        """Put a version's bytes into the object store once, whoever asks for them."""
        if getattr(self, "_published_version", None) != version:
            # ray.put copies, so the shard may go on and write into its vector.
            self._published_ref = ray.put(self._shard.params.view(torch.uint8).numpy())
            self._published_version = version
        return self._published_ref

    def _from_bytes(self, values: NDArray[np.uint8]) -> Tensor:
        # Ray's arrays are read-only maps of its store; torch has no read-only tensor and warns.
        array = values if values.flags.writeable else np.array(values, copy=True)
        return torch.from_numpy(array).view(self._shard.params.dtype)
