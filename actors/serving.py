"""
A server node at work: one shard, and the roads by which gradients come and parameters go.

Calls come in on one thread per worker; what they wait for, and what is applied when, is the
service's (`strategies/training/service.py`). Payload goes by shared memory to and from workers of
this node, as bytes to and from others.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplat.actors.logs import log_to_stderr
from distplat.actors.memory import Segment
from distplat.actors.messages import Address
from distplat.platform.ledger import Answer, PushId
from distplat.platform.pieces import Place, Whole
from distplat.platform.shard_map import Shard, ShardPlan
from distplat.strategies.ports import ShardCopy
from distplat.strategies.training.client import make_service, shard_copy
from distplat.strategies.training.parts import as_array
from distplat.strategies.training.restoring import tensor_of
from distplat.strategies.training.service import Deliver, Limits, Service

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
        self._gradients: dict[int, Tensor] = {}  #: rank -> its part of this shard, shared memory
        self._parameters: dict[int, Tensor] = {}  #: the same of workers that compute on a copy
        self._segment: Segment | None = None
        self._published: tuple[int, ray.ObjectRef[NDArray[np.uint8]]] | None = None

    def assign(
        self, plan: ShardPlan, shard: Shard, total: int, dtype: str, parameters: Address | None
    ) -> Address:
        """
        Take over a shard; a second time does nothing.

        Args:
            plan: the run's facts.
            shard: which run of the flat vector.
            total: elements of the whole vector.
            dtype: its type.
            parameters: this node's parameter segment, if another server has made it.

        Returns:
            Address of the node's parameter segment, of `total` elements.
        """
        if self._segment is not None:
            return self._segment.address
        if parameters is None:
            segment = Segment.create(self._node, total, dtype)
        else:
            segment = Segment.open(parameters)
        self._plan, self._cut = plan, shard
        limits = Limits(plan.job.failure.start_timeout_s, plan.job.failure.step_timeout_s)
        params = segment.tensor[shard.start : shard.stop]
        self._service: Service = make_service(self._name, plan, limits, params)
        self._segment = segment
        log_to_stderr()
        logger.info(
            "shard %d: parameters %d..%d of %d", shard.index, shard.start, shard.stop, total
        )
        return segment.address

    def attach(self, rank: int, gradients: Address, parameters: Address | None) -> bool:
        """Map a worker's segments; False: they cannot be reached, send bytes instead."""
        if rank in self._gradients:
            return True
        try:
            if gradients.node != self._node:
                return False
            if parameters is not None:
                self._parameters[rank] = self._mine(Segment.open(parameters))
            self._gradients[rank] = self._mine(Segment.open(gradients))
        except OSError:
            return False
        return True

    def restore(
        self,
        version: int,
        values: NDArray[np.uint8] | None,
        state: Mapping[str, Whole],
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
                params.copy_(self._from_bytes(values))
            elif 0 in self._parameters:
                params.copy_(self._parameters[0])

        tensors = {name: tensor_of(whole, Place(whole.shape)) for name, whole in state.items()}
        self._service.restore(version, fill, tensors)

    def kept(self, version: int, limit_s: float) -> ShardCopy:
        """Give what was kept of a version, as an object in Ray's store. See `Service.kept`."""
        copy = shard_copy(self._cut.start, self._service, version, limit_s)
        if copy.box is None:
            return copy
        return replace(copy, box=[ray.put([as_array(one) for one in copy.box])])

    def pull(self, rank: int, number: int) -> Answer:
        """Give the newest parameters; see `Service.pull`."""
        return self._service.pull(rank, number, self._deliver(rank))

    def push(self, push: PushId, values: NDArray[np.uint8] | None) -> Answer:
        """Take a gradient's bytes; None: it is in the worker's segment. See `Service.push`."""
        gradient = self._gradients[push.rank] if values is None else self._from_bytes(values)
        return self._service.push(push, gradient, self._deliver(push.rank))

    def commit(self, rank: int, seq: int, norm: float | None) -> Answer:
        """Apply a staged step; see `Service.commit`."""
        return self._service.commit(rank, seq, norm, self._deliver(rank))

    def wait_for_all(self, limit_s: float) -> list[int]:
        """See `Service.wait_for_all`."""
        return self._service.wait_for_all(limit_s)

    def log(self) -> NDArray[np.int64] | None:
        """See `Service.log`; None too before a shard was assigned."""
        return self._service.log() if self._segment is not None else None

    def _deliver(self, rank: int) -> Deliver:
        """Say how values get to a worker; called with the service's lock held."""

        def deliver(values: Tensor, version: int) -> list[object] | None:
            if rank in self._parameters:
                self._parameters[rank].copy_(values)
            if rank in self._gradients:
                return None
            return [self._publish(values, version)]  # in a list, or Ray would send the values

        return deliver

    def _publish(self, values: Tensor, version: int) -> "ray.ObjectRef[NDArray[np.uint8]]":
        """Put a version's bytes into the object store once, whoever asks for them."""
        if self._published is None or self._published[0] != version:
            # ray.put copies, so the shard may go on and write into its vector.
            self._published = version, ray.put(values.view(torch.uint8).numpy())
        return self._published[1]

    def _mine(self, segment: Segment) -> Tensor:
        return segment.tensor[self._cut.start : self._cut.stop]

    def _from_bytes(self, values: NDArray[np.uint8]) -> Tensor:
        # Ray's arrays are read-only maps of its store; torch has no read-only tensor and warns.
        array = values if values.flags.writeable else np.array(values, copy=True)
        return torch.from_numpy(array).view(self._service.params.dtype)
