"""
All-reduce in two levels: shared memory inside a node, a ring between the nodes' leaders.

    node a: ranks 0 1 2          node b: ranks 3 4

    1  reduce    0 <- 1, 2           3 <- 4              shared memory
    2  ring      0 <--------------> 3                    gloo, each node's sum once
    3  broadcast 0 -> 1, 2           3 -> 4              shared memory

A node's sum crosses the network once, not once for each of its ranks. Large vectors go in blocks:
the ring passes one while the next is summed. All ranks end with the bits that the ring's leaders
have, and sums run in the same order in every run. The leader is the first rank of its node.

What is no sum of all ranks' vectors goes over the gloo group of all ranks, which this class is; so
do the comparison of operations and the search for missing ranks. (docs/decisions/backends.md)
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ray.util.collective import types
from torch import Tensor

from distplat.actors.collective.gloo import GlooGroup, begin_allreduce, begin_broadcast
from distplat.actors.collective.group import Group, prepare
from distplat.actors.collective.header import Header, header
from distplat.actors.collective.places import forget, meet
from distplat.actors.collective.underway import Underway
from distplat.actors.shm.group import ShmGroup
from distplat.actors.shm.order import Order
from distplat.platform.errors import CollectiveError, DeadlineExceeded, MismatchError
from distplat.platform.topology import by_node
from distplat.strategies.algorithms.ring import traffic_elements
from distplat.strategies.collective import Handle, Traffic

BACKEND = "DISTPLAT_HIERARCHICAL"
BLOCK_BYTES = 8 * 2**20
_CLOSE_S = 2.0


class HierarchicalGroup(GlooGroup):
    """One rank's end of a group over several nodes (see Ray's `BaseGroup` for the calls)."""

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self._near: Group | None = None  #: this node's ranks, if there are several
        self._ring: Any = None  #: the leaders, if this rank is one of several
        self._order = Order(f"hierarchical {group_name}")
        self._counted = Traffic()
        self._once = threading.Lock()
        self._in_node = True
        try:
            self._find_neighbours()
        except BaseException:
            self.destroy_group()
            raise

    def _find_neighbours(self) -> None:
        places = self.places
        if places is None:  # made by Ray's own call
            places = meet(self.group_name, self.rank, self.world_size, self.settings)
        nodes = by_node(places)
        self._node = next(n for n, ranks in enumerate(nodes) if self.rank in ranks)
        self._nodes, self._local = nodes, nodes[self._node]
        if len(self._local) > 1:
            self._near = self._join_node(f"{self.group_name}#node-{self._node}")
        if len(nodes) > 1 and self.rank == self._local[0]:
            self._ring = self._link.connect_some("leaders", self._node, len(nodes))
        self._link.start(header("barrier"), lambda group: [group.barrier()]).wait()
        if self.places is None and self.rank == 0:
            forget(self.group_name)

    def _join_node(self, name: str) -> Group:
        prepare(name, self.settings)
        try:
            return ShmGroup(len(self._local), self._local.index(self.rank), name)
        except DeadlineExceeded as error:
            named = {f"worker-{n}": f"worker-{rank}" for n, rank in enumerate(self._local)}
            missing = tuple(named.get(who, who) for who in error.missing)
            raise DeadlineExceeded(error.what, missing, error.seconds, error.setting) from None

    @classmethod
    def backend(cls) -> str:
        """Name under which Ray knows this backend."""
        return BACKEND

    def destroy_group(self) -> None:
        """Close the connections and leave the memory; peers in an operation fail soon."""
        self._leave_node()
        self._link.close()
        self._order.close(_CLOSE_S)

    def abort(self) -> None:
        """See `Group`."""
        if self._near is not None:
            self._near.abort()
        self._link.abort()

    def share(self, like: Tensor) -> Tensor:
        """See `Group`; shared with the ranks of this node."""
        return super().share(like) if self._near is None else self._near.share(like)

    def allreduce(self, tensors: list[Tensor], allreduce_options: Any) -> None:
        """Reduce in place."""
        self._order.now(partial(self._all_reduce, tensors[0], allreduce_options.reduceOp))

    def start_allreduce(self, tensor: Tensor, op: types.ReduceOp) -> Handle:
        """See `Group`; the group's thread does it."""
        return self._order.later(partial(self._all_reduce, tensor, op))

    def broadcast(self, tensors: list[Tensor], broadcast_options: Any) -> None:
        """Copy the root's tensor to all."""
        self._order.now(partial(self._broadcast, tensors[0], broadcast_options.root_rank))

    def barrier(self, barrier_options: Any = None) -> None:
        """Wait for all."""
        self._order.now(partial(super().barrier, barrier_options))

    def reduce(self, tensors: list[Tensor], reduce_options: Any) -> None:
        """Reduce into the root's tensor."""
        self._order.now(partial(super().reduce, tensors, reduce_options))

    def allgather(
        self, tensor_lists: list[list[Tensor]], tensors: list[Tensor], allgather_options: Any = None
    ) -> None:
        """Copy every rank's tensor to all."""
        self._order.now(partial(super().allgather, tensor_lists, tensors, allgather_options))

    def reducescatter(
        self, tensors: list[Tensor], tensor_lists: list[list[Tensor]], reducescatter_options: Any
    ) -> None:
        """Reduce the n-th tensors of all ranks into rank n's."""
        work = partial(super().reducescatter, tensors, tensor_lists, reducescatter_options)
        self._order.now(work)

    def start_send(self, tensor: Tensor, to: int) -> Handle:
        """Begin to send to one rank, by memory if it is near; then it is done at once."""
        if self._near is None or to not in self._local:
            return super().start_send(tensor, to)
        near, place = self._near, self._local.index(to)
        begun: list[Handle] = []
        self._message(lambda: begun.append(near.start_send(tensor, place)))
        return begun[0]

    def recv(self, tensors: list[Tensor], recv_options: Any) -> None:
        """Receive from one rank, by memory if it is near."""
        if self._near is None or recv_options.src_rank not in self._local:
            super().recv(tensors, recv_options)
            return
        options = types.RecvOptions()
        options.src_rank = self._local.index(recv_options.src_rank)
        self._message(partial(self._near.recv, tensors, options))

    def _all_reduce(self, tensor: Tensor, op: types.ReduceOp) -> None:
        step = max(1, BLOCK_BYTES // tensor.itemsize)
        flat = tensor.view(-1)
        blocks = [flat[at : at + step] for at in range(0, flat.numel(), step)]
        near, reduction = self._near, types.ReduceOptions()
        reduction.reduceOp = op

        def work(fail: Callable[[Exception], CollectiveError]) -> None:
            rings = []
            for block in blocks:
                if near is not None:
                    near.reduce([block], reduction)
                if self._ring is not None:
                    moved = traffic_elements(block.numel(), self._node, len(self._nodes))
                    sent, received = (elements * block.itemsize for elements in moved)
                    ring = begin_allreduce(self._ring, block, op)
                    rings.append(Underway([ring], self._link.accounts, fail, (sent, received)))
            for number, block in enumerate(blocks):
                if rings:
                    rings[number].wait()
                if near is not None:
                    near.broadcast([block], types.BroadcastOptions())

        self._perform(header("all_reduce", [tensor], op), work)

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        home = next(n for n, ranks in enumerate(self._nodes) if root in ranks)
        here, nodes = home == self._node, len(self._nodes)
        first = types.BroadcastOptions()
        first.root_rank = self._local.index(root) if here else 0

        def work(fail: Callable[[Exception], CollectiveError]) -> None:
            if here and self._near is not None:  # first to the leader, and to all on the way
                self._near.broadcast([tensor], first)
            if self._ring is not None and tensor.numel():
                moved = (tensor.nbytes * (nodes - 1), 0) if here else (0, tensor.nbytes)
                ring = begin_broadcast(self._ring, tensor, home)
                Underway([ring], self._link.accounts, fail, moved).wait()
            if not here and self._near is not None:
                self._near.broadcast([tensor], first)

        self._perform(header("broadcast", [tensor], root=root), work)

    def _perform(
        self, head: Header, work: Callable[[Callable[[Exception], CollectiveError]], None]
    ) -> None:
        """Do an operation that begins or ends inside the nodes; errors name ranks of all nodes."""
        number = self._link.enter(head)

        def fail(error: Exception) -> CollectiveError:
            self._leave_node()  # before the search, which takes time: who is near shall not wait
            return self._link.failed(head.name, error, number=number)

        try:
            work(fail)
        except MismatchError as error:
            self._link.cut()  # the other nodes wait for this one
            raise self._seen_from_outside(error) from None
        except (CollectiveError, RuntimeError) as error:
            raise fail(error) from None
        finally:
            self._account()

    def _message(self, work: Callable[[], None]) -> None:
        try:
            work()
        except CollectiveError as error:
            raise self._seen_from_outside(error) from None
        finally:
            self._account()

    def _seen_from_outside(self, error: CollectiveError) -> CollectiveError:
        """Name the ranks by their place in this group."""
        missing = tuple(self._local[place] for place in error.missing)
        cause = f"{error.cause} (on one node, where 0.. are ranks {self._local})"
        return type(error)(self.group_name, error.operation, error.number, missing, cause)

    def _leave_node(self) -> None:
        with self._once:
            stays, self._in_node = self._in_node, False
        if stays and self._near is not None:
            self._near.destroy_group()

    def _account(self) -> None:
        """Count what went through this node's memory."""
        if self._near is None:
            return
        with self._once:
            now, last = replace(self._near.traffic), self._counted
            self._counted = now
            self._link.accounts.add(
                Traffic(
                    now.sent_bytes - last.sent_bytes,
                    now.received_bytes - last.received_bytes,
                    now.waiting_s - last.waiting_s,
                    now.working_s - last.working_s,
                )
            )
