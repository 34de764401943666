"""
A backend for `ray.util.collective` for ranks on one node: they exchange through shared memory.

Rank 0 makes the memory and leaves its address with Ray; the others map it. All else happens in the
memory itself, signalled by futexes: no server, no sockets, no copies through the kernel. The parts:

    group    rendezvous, and Ray's calls
    end      one rank's operations: order, accounts, failure      order, host
    ops      the operations in blocks                             rounds, kernels
    mail     send and receive
    signals  posts, waits, comparison of headers                  header, watch, memory/futex
    arena    what lies where in the memory                        vectors, memory/memfd

(docs/decisions/shared_memory_collectives.md)
"""

import json
import os
from typing import Any

import ray
import torch
from ray.experimental.internal_kv import _internal_kv_del
from ray.util.collective import types
from torch import Tensor

from distplat.actors.collective.group import Group, find_word, leave_word, wait_for
from distplat.actors.memory import futex
from distplat.actors.messages import Address, rendezvous_key
from distplat.actors.shm.arena import Arena, Layout
from distplat.actors.shm.end import End
from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import Handle, ReduceOp

BACKEND = "DISTPLAT_SHM"

_OPS = {
    types.ReduceOp.SUM: ReduceOp.SUM,
    types.ReduceOp.PRODUCT: ReduceOp.PRODUCT,
    types.ReduceOp.MIN: ReduceOp.MIN,
    types.ReduceOp.MAX: ReduceOp.MAX,
}


class ShmGroup(Group):
    """One rank's end of a group on one node (see Ray's `BaseGroup` for the calls)."""

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self._node = ray.get_runtime_context().get_node_id()
        arena = self._create() if rank == 0 else self._open()
        limits = self.settings
        self._end = End(group_name, arena, limits.operation_s, limits.abandoned, self.traffic)
        self._end.enter()
        try:
            self._wait_for_all()
        except BaseException:
            self._end.close()
            raise
        finally:
            if rank == 0:
                _internal_kv_del(rendezvous_key(group_name))
        self._end.begin()

    @classmethod
    def backend(cls) -> str:
        """Name under which Ray knows this backend."""
        return BACKEND

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Whether this machine has what it takes: Linux, and a processor whose calls we know."""
        return futex.supported() and hasattr(os, "memfd_create")

    def destroy_group(self) -> None:
        """Leave; peers in an operation fail at once."""
        self._end.close()

    def abort(self) -> None:
        """See `Group`."""
        self._end.abort()

    def share(self, like: Tensor) -> Tensor:
        """See `Group`."""
        return self._end.share(like)

    def allreduce(self, tensors: list[Tensor], allreduce_options: Any) -> None:
        """Reduce in place."""
        self._end.all_reduce(_tensor(tensors[0]), _OPS[allreduce_options.reduceOp])

    def start_allreduce(self, tensor: Tensor, op: types.ReduceOp) -> Handle:
        """See `Group`."""
        return self._end.start_all_reduce(_tensor(tensor), _OPS[op])

    def reduce(self, tensors: list[Tensor], reduce_options: Any) -> None:
        """Reduce into the root's tensor."""
        op, root = _OPS[reduce_options.reduceOp], reduce_options.root_rank
        self._end.reduce(_tensor(tensors[0]), op, root)

    def broadcast(self, tensors: list[Tensor], broadcast_options: Any) -> None:
        """Copy the root's tensor to all."""
        self._end.broadcast(_tensor(tensors[0]), broadcast_options.root_rank)

    def allgather(
        self, tensor_lists: list[list[Tensor]], tensors: list[Tensor], allgather_options: Any = None
    ) -> None:
        """Copy every rank's tensor to all."""
        self._end.all_gather([_tensor(t) for t in tensor_lists[0]], _tensor(tensors[0]))

    def reducescatter(
        self, tensors: list[Tensor], tensor_lists: list[list[Tensor]], reducescatter_options: Any
    ) -> None:
        """Reduce the n-th tensors of all ranks into rank n's."""
        op = _OPS[reducescatter_options.reduceOp]
        self._end.reduce_scatter(_tensor(tensors[0]), [_tensor(t) for t in tensor_lists[0]], op)

    def send(self, tensors: list[Tensor], send_options: Any) -> None:
        """Send to one rank."""
        self._end.send(_tensor(tensors[0]), send_options.dst_rank)

    def recv(self, tensors: list[Tensor], recv_options: Any) -> None:
        """Receive from one rank."""
        self._end.recv(_tensor(tensors[0]), recv_options.src_rank)

    def barrier(self, barrier_options: Any = None) -> None:
        """Wait for all."""
        self._end.barrier()

    def _create(self) -> Arena:
        """Make the memory and say where it is."""
        layout = Layout.of(self.world_size)
        arena = Arena.create(self._node, layout)
        where = arena.segment.address
        word = {"node": self._node, "pid": where.pid, "fd": where.fd, "world": self.world_size}
        leave_word(self.group_name, json.dumps(word).encode())
        return arena

    def _open(self) -> Arena:
        """Find the memory that rank 0 has made, and map it."""
        word = json.loads(find_word(self.group_name, 0, self.settings))
        if word["world"] != self.world_size:
            raise self._failed(
                f"rank 0 says {word['world']} ranks, rank {self.rank} says {self.world_size}"
            )
        if word["node"] != self._node:
            raise self._failed(
                f"rank 0 is on node {word['node']}, rank {self.rank} on node {self._node}: "
                "shared memory works inside a node; choose `backend: hierarchical` or `gloo`"
            )
        layout = Layout.of(self.world_size)
        address = Address(self._node, word["pid"], word["fd"], layout.size, "uint8")
        try:
            return Arena.open(address, layout, self.rank)
        except OSError as error:
            raise self._failed(
                f"rank {self.rank} on node {self._node} cannot open the memory of rank 0 (process "
                f"{address.pid} on node {address.node}): {error}; rank 0 is gone, or the two run "
                "in different containers or as different users: then choose `backend: gloo`"
            ) from error

    def _failed(self, cause: str) -> CollectiveError:
        return CollectiveError(self.group_name, "rendezvous", 0, (0,), cause)

    def _wait_for_all(self) -> None:
        wait_for(
            lambda: None if self._end.absent() else b"",
            self.group_name,
            self._end.absent,
            self.settings,
        )


def _tensor(array: Any) -> Tensor:
    """Ray's users may bring numpy arrays; a tensor shares their memory."""
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
