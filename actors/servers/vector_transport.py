"""
Where a worker's parameters and gradients lie, and how they get to the servers and back.

    server on this node    gradients: it maps this worker's segment
                           parameters, shared: the worker maps the node's and computes on it
                           parameters, private: the server copies them into the worker's segment
    server elsewhere       gradients: bytes in the call
                           parameters: an object that the server puts, and the worker gets

Shared is for servers that change only while all workers wait: a node then holds one copy of the
parameters for all of them, and a new version is there when the answer comes. Private is for servers
that go on meanwhile.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import Membership, MemoryAddress, ModelFacts
from distplat.actors.transport import Transport
from distplat.platform.ledger import ServerReply
from distplat.platform.shard_map import Shard
from distplat.platform.tensor_slices import RawTensor
from distplat.platform.vector_layout import Layout
from distplat.strategies.checkpoint.parts import whole_of
from distplat.strategies.model.optimizer_state import PER_PARAMETER, USED, WHOLE


class VectorTransport(ABC):
    """
    One worker's vectors.

    Args:
        transport: the worker's.
        facts: of the model.
        joined: where the servers are.
    """

    parameters: Tensor
    """Shape [n], on the CPU; there after `open`."""
    one_copy = False
    """Whether the worker computes on the servers' own memory."""
    parameter_address: MemoryAddress | None = None
    """Where servers find it; None: they need not."""

    def __init__(self, transport: Transport, facts: ModelFacts, joined: Membership) -> None:
        self._transport, self._facts, self._joined = transport, facts, joined
        self._node = transport.node
        self._gradient_segment = MemorySegment.create(self._node, facts.size, facts.dtype)
        self.gradients = self._gradient_segment.tensor  #: shape [n]
        self.gradient_address = self._gradient_segment.address
        self.local_shards: set[int] = set()  #: shards whose server shares memory with this worker

    @abstractmethod
    def candidates(self) -> list[int]:
        """Give the shards whose servers may share memory with this worker."""

    def open(self, local_shards: set[int]) -> None:
        """Note which servers share memory: nobody else will map the segments."""
        self.local_shards = local_shards
        self._gradient_segment.seal()

    def part_ways(self) -> None:
        """Have the worker compute on a vector of its own, whose content is that of `parameters`."""
        if self.one_copy:
            self.one_copy, self.parameters = False, self.parameters.clone()

    def put(self, cut: Shard, initial: Tensor) -> None:
        """Lay initial parameters where a near server finds them."""
        part(self.parameters, cut).copy_(part(initial, cut))

    def take(self, cut: Shard, answer: ServerReply, limit_s: float) -> None:
        """Copy the values of an answer to `parameters`, unless a local server has done so."""
        if cut.index in self.local_shards:
            return
        values: NDArray[np.uint8] = self._transport.get(answer.payload[0], limit_s)
        own_part = part(self.parameters, cut)
        if self._joined.wire is None:
            as_bytes(own_part)[:] = values
        else:
            own_part.copy_(from_bytes(values, getattr(torch, self._joined.wire)))

    def traffic(self, cut: Shard) -> tuple[int, int]:
        """Give the bytes of a step's gradient for a shard, and of the parameters it brings."""
        size = cut.size * self.gradients.itemsize
        if cut.index in self.local_shards:
            return size, 0 if self.one_copy else size
        wire = self._joined.wire
        travels = size if wire is None else cut.size * getattr(torch, wire).itemsize
        return travels, travels

    def payload(
        self, cut: Shard, vector: Tensor, *, exact: bool = False
    ) -> NDArray[np.uint8] | None:
        """Give what must travel in a call so that the server has its part of `vector`."""
        if cut.index in self.local_shards:
            return None
        return as_bytes(as_type(part(vector, cut), None if exact else self._joined.wire))


class SharedMemoryTransport(VectorTransport):
    """Parameters in memory that servers and workers of a node share."""

    def __init__(self, transport: Transport, facts: ModelFacts, joined: Membership) -> None:
        super().__init__(transport, facts, joined)
        self._segments: dict[int, MemorySegment] = {}

    @override
    def candidates(self) -> list[int]:
        opened: dict[tuple[int, int], MemorySegment] = {}
        # Of a server's own segment, whole in length, only its shard has memory.
        populate = not self._joined.replicated
        for index, address in enumerate(self._joined.parameters):
            if address.node != self._node:
                continue
            key = address.pid, address.fd
            try:
                opened[key] = opened.get(key) or MemorySegment.open(address, populate=populate)
            except OSError:
                continue  # another container on this node: its servers are reached as if far away
            self._segments[index] = opened[key]
        return list(self._segments)

    @override
    def open(self, local_shards: set[int]) -> None:
        """Where all servers are near, the model moves into their segment."""
        super().open(local_shards)
        everybody = range(len(self._joined.servers))
        segments = [self._segments.get(i) if i in local_shards else None for i in everybody]
        first = segments[0]
        self.one_copy = first is not None and all(s is first for s in segments)
        if first is not None and self.one_copy:
            self.parameters = first.tensor
        else:
            dtype = getattr(torch, self._facts.dtype)
            self.parameters = torch.zeros(self._facts.size, dtype=dtype)

    @override
    def put(self, cut: Shard, initial: Tensor) -> None:
        part(self._segments[cut.index].tensor, cut).copy_(part(initial, cut))

    @override
    def take(self, cut: Shard, answer: ServerReply, limit_s: float) -> None:
        super().take(cut, answer, limit_s)
        if cut.index in self.local_shards and not self.one_copy:
            part(self.parameters, cut).copy_(part(self._segments[cut.index].tensor, cut))


class CopyTransport(VectorTransport):
    """Parameters that each worker has a copy of, as servers change while it computes."""

    def __init__(self, transport: Transport, facts: ModelFacts, joined: Membership) -> None:
        super().__init__(transport, facts, joined)
        self._segment = MemorySegment.create(self._node, facts.size, facts.dtype)
        self.parameters = self._segment.tensor
        self.parameter_address = self._segment.address

    @override
    def candidates(self) -> list[int]:
        nodes = [address.node for address in self._joined.parameters]
        return [index for index, node in enumerate(nodes) if node == self._node]

    @override
    def open(self, local_shards: set[int]) -> None:
        super().open(local_shards)
        self._segment.seal()


def part(vector: Tensor, cut: Shard) -> Tensor:
    """Give a shard's run of a vector."""
    return vector[cut.start : cut.stop]


def run_of(state: Mapping[str, Tensor], cut: Shard) -> dict[str, RawTensor]:
    """Give a shard's part of what an optimizer remembers of the flat vector; it takes its own."""
    whole = (PER_PARAMETER, WHOLE)
    return {
        name: whole_of(value if name.startswith(whole) else value[cut.start : cut.stop])
        for name, value in state.items()
    }


def joined_state(
    states: Sequence[Mapping[str, RawTensor]], cuts: Sequence[Shard], layout: Layout
) -> dict[str, Tensor]:
    """
    Put together what the optimizers of all shards remember; see `FlatOptimizer.state`.

    Args:
        states: by shard; empty where nothing is remembered.
        cuts: the shards.
        layout: of the whole vector.
    """
    joined: dict[str, Tensor] = {}
    for raws, cut in zip(states, cuts, strict=True):
        state = {
            name: from_bytes(raw.data, getattr(torch, raw.dtype)) for name, raw in raws.items()
        }
        for name, values in state.items():
            if name.startswith(PER_PARAMETER):
                into = joined.setdefault(name, torch.zeros(layout.parameters, dtype=values.dtype))
                into[state[USED]] = values[state[USED]]
            else:
                into = joined.setdefault(name, torch.zeros(layout.size, dtype=values.dtype))
                into[cut.start : cut.stop] = values
    return joined


def as_bytes(vector: Tensor) -> NDArray[np.uint8]:
    """View a CPU tensor as bytes: every dtype travels, numpy's and others."""
    array: NDArray[np.uint8] = vector.view(torch.uint8).numpy()
    return array


def from_bytes(values: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """See bytes as a tensor of this type, shape [their number / its size]."""
    # Ray's arrays are read-only maps of its store; torch has no read-only tensor and warns.
    array = values if values.flags.writeable else np.array(values, copy=True)
    return torch.from_numpy(array).view(dtype)


def as_type(vector: Tensor, wire: str | None) -> Tensor:
    """Give a vector in the type that travels: itself, or a copy; what fp16 cannot hold is inf."""
    return vector if wire is None else vector.to(getattr(torch, wire))
