"""
Placement of a worker's parameters and gradients, and their transfer to and from the servers.

    server on this node    gradients: the server maps the worker's segment
                           parameters, shared: the worker maps the node's segment and computes on it
                           parameters, private: the server copies them into the worker's segment
    server elsewhere       gradients: bytes in the call
                           parameters: the server puts an object in the store, the worker gets it

Shared memory is used if servers update only while all workers wait: a node then holds one copy of
the parameters for all its workers, and the new version is visible when the answer arrives. Private
memory is used if servers update while workers compute.
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
    A worker's vectors of parameters and gradients.

    Args:
        transport: the worker's.
        facts: of the model.
        joined: the servers and their addresses.
    """

    parameters: Tensor
    """Shape [n], on the CPU; set by `open`."""
    one_copy = False
    """Whether the worker computes on the servers' own memory."""
    parameter_address: MemoryAddress | None = None
    """Segment into which servers copy parameters; None: they do not."""

    def __init__(self, transport: Transport, facts: ModelFacts, joined: Membership) -> None:
        self._transport, self._facts, self._joined = transport, facts, joined
        self._node = transport.node
        self._gradient_segment = MemorySegment.create(self._node, facts.size, facts.dtype)
        self.gradients = self._gradient_segment.tensor  #: shape [n]
        self.gradient_address = self._gradient_segment.address
        self.local_shards: set[int] = set()  #: shards whose server shares memory with this worker

    @abstractmethod
    def candidates(self) -> list[int]:
        """Return the shards whose servers may share memory with this worker."""

    def open(self, local_shards: set[int]) -> None:
        """Set the shards whose servers share memory, and seal the segments: all are mapped."""
        self.local_shards = local_shards
        self._gradient_segment.seal()

    def detach(self) -> None:
        """Replace `parameters` by a copy if they are the servers' memory."""
        if self.one_copy:
            self.one_copy, self.parameters = False, self.parameters.clone()

    def put(self, cut: Shard, initial: Tensor) -> None:
        """Copy initial parameters to where a server on this node reads them."""
        shard_view(self.parameters, cut).copy_(shard_view(initial, cut))

    def receive(self, cut: Shard, answer: ServerReply, limit_s: float) -> None:
        """Copy the values of an answer to `parameters`, unless a local server has done so."""
        if cut.index in self.local_shards:
            return
        values: NDArray[np.uint8] = self._transport.get(answer.payload[0], limit_s)
        destination = shard_view(self.parameters, cut)
        if self._joined.wire is None:
            as_bytes(destination)[:] = values
        else:
            destination.copy_(from_bytes(values, getattr(torch, self._joined.wire)))

    def traffic(self, cut: Shard) -> tuple[int, int]:
        """Return the bytes per step of a shard: of its gradient, and of its new parameters."""
        size = cut.size * self.gradients.itemsize
        if cut.index in self.local_shards:
            return size, 0 if self.one_copy else size
        wire = self._joined.wire
        wire_size = size if wire is None else cut.size * getattr(torch, wire).itemsize
        return wire_size, wire_size

    def payload(
        self, cut: Shard, vector: Tensor, *, exact: bool = False
    ) -> NDArray[np.uint8] | None:
        """
        Return a shard's part of `vector` as bytes for a call; None: its server shares memory.

        Args:
            cut: the shard.
            vector: shape [n].
            exact: keep the vector's dtype instead of the `wire` dtype.
        """
        if cut.index in self.local_shards:
            return None
        return as_bytes(as_type(shard_view(vector, cut), None if exact else self._joined.wire))


class SharedMemoryTransport(VectorTransport):
    """Vectors whose parameters lie in memory that servers and workers of a node share."""

    def __init__(self, transport: Transport, facts: ModelFacts, joined: Membership) -> None:
        super().__init__(transport, facts, joined)
        self._segments: dict[int, MemorySegment] = {}

    @override
    def candidates(self) -> list[int]:
        opened: dict[tuple[int, int], MemorySegment] = {}
        # A replicated server's segment has the length of the whole vector, but memory only for its
        # shard.
        populate = not self._joined.replicated
        for index, address in enumerate(self._joined.parameters):
            if address.node != self._node:
                continue
            key = address.pid, address.fd
            try:
                opened[key] = opened.get(key) or MemorySegment.open(address, populate=populate)
            except OSError:
                continue  # another container on this node: treat its servers as remote
            self._segments[index] = opened[key]
        return list(self._segments)

    @override
    def open(self, local_shards: set[int]) -> None:
        """If all servers share one segment with this worker, compute on that segment."""
        super().open(local_shards)
        shards = range(len(self._joined.servers))
        segments = [self._segments.get(i) if i in local_shards else None for i in shards]
        first = segments[0]
        self.one_copy = first is not None and all(s is first for s in segments)
        if first is not None and self.one_copy:
            self.parameters = first.tensor
        else:
            dtype = getattr(torch, self._facts.dtype)
            self.parameters = torch.zeros(self._facts.size, dtype=dtype)

    @override
    def put(self, cut: Shard, initial: Tensor) -> None:
        shard_view(self._segments[cut.index].tensor, cut).copy_(shard_view(initial, cut))

    @override
    def receive(self, cut: Shard, answer: ServerReply, limit_s: float) -> None:
        super().receive(cut, answer, limit_s)
        if cut.index in self.local_shards and not self.one_copy:
            source = shard_view(self._segments[cut.index].tensor, cut)
            shard_view(self.parameters, cut).copy_(source)


class CopyTransport(VectorTransport):
    """Vectors with a copy of the parameters per worker: servers update while workers compute."""

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


def shard_view(vector: Tensor, cut: Shard) -> Tensor:
    """Return a view of a shard's part of a vector."""
    return vector[cut.start : cut.stop]


def shard_state(state: Mapping[str, Tensor], cut: Shard) -> dict[str, RawTensor]:
    """
    Return the optimizer state of a shard.

    Entries per parameter, and those that are not split, are copied whole; the shard's optimizer
    selects its own.

    Args:
        state: of the whole flat vector.
        cut: the shard.
    """
    unsplit = (PER_PARAMETER, WHOLE)
    return {
        name: whole_of(value if name.startswith(unsplit) else value[cut.start : cut.stop])
        for name, value in state.items()
    }


def merge_states(
    states: Sequence[Mapping[str, RawTensor]], cuts: Sequence[Shard], layout: Layout
) -> dict[str, Tensor]:
    """
    Merge the optimizer states of all shards; see `FlatOptimizer.state`.

    Args:
        states: by shard; empty if an optimizer has no state.
        cuts: the shards.
        layout: of the whole vector.
    """
    merged: dict[str, Tensor] = {}
    for raws, cut in zip(states, cuts, strict=True):
        state = {
            name: from_bytes(raw.data, getattr(torch, raw.dtype)) for name, raw in raws.items()
        }
        for name, values in state.items():
            if name.startswith(PER_PARAMETER):
                total = merged.setdefault(name, torch.zeros(layout.parameters, dtype=values.dtype))
                total[state[USED]] = values[state[USED]]
            else:
                total = merged.setdefault(name, torch.zeros(layout.size, dtype=values.dtype))
                total[cut.start : cut.stop] = values
    return merged


def as_bytes(vector: Tensor) -> NDArray[np.uint8]:
    """Return a CPU tensor as a view of bytes, also of dtypes that numpy lacks."""
    array: NDArray[np.uint8] = vector.view(torch.uint8).numpy()
    return array


def from_bytes(values: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """Return bytes as a tensor of this dtype, shape [bytes / itemsize]; copies read-only bytes."""
    # Arrays from Ray's object store are read-only; torch has no read-only tensors and warns.
    array = values if values.flags.writeable else np.array(values, copy=True)
    return torch.from_numpy(array).view(dtype)


def as_type(vector: Tensor, wire: str | None) -> Tensor:
    """Return a vector in the `wire` dtype, copied if it differs; values out of range become inf."""
    return vector if wire is None else vector.to(getattr(torch, wire))
