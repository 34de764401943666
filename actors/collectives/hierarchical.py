"""
Hierarchical all-reduce: shared memory within a node, a gloo ring between the nodes' leaders.

    node a: ranks 0 1 2          node b: ranks 3 4

    1  reduce    0 <- 1, 2           3 <- 4              shared memory
    2  ring      0 <--------------> 3                    gloo, each node's sum once
    3  broadcast 0 -> 1, 2           3 -> 4              shared memory

A node's sum crosses the network once, not once for each of its ranks. Large vectors are split into
blocks: the ring sends a block while the next one is summed. Results are bitwise equal on all ranks,
and sums are computed in the same order in every run. The leader is the first rank of its node.

Operations other than all-reduce and broadcast use the base class's gloo group of all ranks, as do
the comparison of headers and the search for missing ranks. (docs/decisions/backends.md)
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from typing_extensions import override

from distplat.actors.collectives.group import sum_for_avg
from distplat.actors.collectives.header import Header, header
from distplat.actors.collectives.rendezvous import GroupMember, delete_locations, exchange_locations
from distplat.actors.collectives.shm.shm_group import ShmGroup
from distplat.actors.collectives.torch_group import ConvertError, TorchGroup, do_nothing
from distplat.actors.collectives.torch_store import run_until_abandoned
from distplat.actors.collectives.work import OpQueue, Work
from distplat.platform.errors import CollectiveError, DeadlineExceeded, MismatchError
from distplat.platform.topology import by_node
from distplat.strategies import torch_compat
from distplat.strategies.algorithms.reduce import traffic_elements
from distplat.strategies.collective import ReduceOp, Traffic

BLOCK_BYTES = 8 * 2**20
_CLOSE_S = 2.0


class HierarchicalGroup(TorchGroup):
    """
    One rank of a group over several nodes.

    Args:
        member: the rank and its group.

    Raises:
        DeadlineExceeded: a rank did not join within `settings.rendezvous_s`.
        CollectiveError: the group broke while it formed, or `settings.abandoned` was set.
    """

    def __init__(self, member: GroupMember) -> None:
        super().__init__(member)
        self._node_group: ShmGroup | None = None  #: the ranks of this node, if it has several
        self._ring: Any = None  #: the leaders, if this rank is a leader and there are several
        self._queue = OpQueue(f"hierarchical {self.name}")
        self._counted = Traffic()
        self._lock = threading.Lock()
        self._in_node_group = True
        try:
            self._connect_levels(member)
        except BaseException:
            self.close()
            raise

    def _connect_levels(self, member: GroupMember) -> None:
        exchanges_locations = member.locations is None  # created by a call of Ray
        self._nodes = by_node(member.locations or exchange_locations(member))
        self._node = next(n for n, ranks in enumerate(self._nodes) if self.rank in ranks)
        self._local = self._nodes[self._node]
        if len(self._local) > 1:
            self._node_group = self._join_node(f"{self.name}#node-{self._node}")
        if len(self._nodes) > 1 and self.rank == self._local[0]:
            self._ring = self._connect_leaders()
        super().barrier()
        if exchanges_locations and self.rank == 0:
            delete_locations(self.name)

    def _join_node(self, name: str) -> ShmGroup:
        try:
            local_rank = self._local.index(self.rank)
            return ShmGroup(GroupMember(name, local_rank, len(self._local), self.settings))
        except DeadlineExceeded as error:
            names = {f"worker-{n}": f"worker-{rank}" for n, rank in enumerate(self._local)}
            missing = tuple(names.get(name, name) for name in error.missing)
            raise DeadlineExceeded(error.what, missing, error.seconds, error.setting) from None

    def _connect_leaders(self) -> Any:
        connect = partial(self._connect, self._store, "leaders", self._node, len(self._nodes))
        ring = run_until_abandoned(connect, self.name, self.settings)
        self._connections.append(ring)
        return ring[0]

    @override
    def share(self, like: Tensor) -> Tensor:
        """Return zeros like `like`, shared with the ranks of this node."""
        return super().share(like) if self._node_group is None else self._node_group.share(like)

    @override
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        self._queue.run(partial(self._all_reduce, tensor, op))

    @property
    @override
    def start_waits(self) -> bool:
        """False: the group's thread waits, not the caller."""
        return False

    @override
    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        return self._queue.submit(partial(self._all_reduce, tensor, op))

    @override
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        self._queue.run(partial(self._broadcast, tensor, source))

    @override
    def _start(
        self,
        head: Header,
        start: Callable[[], Sequence[Any]],
        traffic: tuple[int, int] = (0, 0),
        after: Callable[[], None] = do_nothing,
        *,
        overlaps: bool = False,
    ) -> Work:
        """Run a gloo operation in the group's queue, and wait for it."""
        start_work = partial(super()._start, head, start, traffic, after)
        self._queue.run(lambda: start_work().wait())
        return Work()

    @override
    def start_send(self, tensor: Tensor, to: int) -> Work:
        """Start to send to one rank; a send to a rank of this node is complete on return."""
        if self._node_group is None or to not in self._local:
            return super().start_send(tensor, to)
        self._run_message(partial(self._node_group.send, tensor, self._local.index(to)))
        return Work()

    @override
    def recv(self, tensor: Tensor, source: int) -> None:
        if self._node_group is None or source not in self._local:
            super().recv(tensor, source)
            return
        self._run_message(partial(self._node_group.recv, tensor, self._local.index(source)))

    def _all_reduce(self, tensor: Tensor, op: ReduceOp) -> None:
        size = max(1, BLOCK_BYTES // tensor.itemsize)
        flat = tensor.view(-1)
        blocks = [flat[start : start + size] for start in range(0, flat.numel(), size)]
        node_group = self._node_group

        def operation(convert: ConvertError) -> None:
            works = []
            for block in blocks:
                if node_group is not None:
                    node_group.reduce(block, sum_for_avg(op), 0)
                if self._ring is not None:
                    elements = traffic_elements(block.numel(), self._node, len(self._nodes))
                    sent, received = (count * block.itemsize for count in elements)
                    work = torch_compat.all_reduce(self._ring, block, sum_for_avg(op))
                    works.append(self._work([work], convert, (sent, received)))
            for number, block in enumerate(blocks):
                if works:
                    works[number].wait()
                if node_group is not None:
                    node_group.broadcast(block)

        self._perform(header("all_reduce", [tensor], op), operation)
        self._average(tensor, op)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        source_node = next(n for n, ranks in enumerate(self._nodes) if source in ranks)
        is_source_node, nodes = source_node == self._node, len(self._nodes)
        local_source = self._local.index(source) if is_source_node else 0

        def operation(convert: ConvertError) -> None:
            # On the source's node the first broadcast also reaches the leader.
            if is_source_node and self._node_group is not None:
                self._node_group.broadcast(tensor, local_source)
            if self._ring is not None and tensor.numel():
                traffic = (tensor.nbytes * (nodes - 1), 0) if is_source_node else (0, tensor.nbytes)
                work = torch_compat.broadcast(self._ring, tensor, source_node)
                self._work([work], convert, traffic).wait()
            if not is_source_node and self._node_group is not None:
                self._node_group.broadcast(tensor, local_source)

        self._perform(header("broadcast", [tensor], root=source), operation)

    def _perform(self, head: Header, operation: Callable[[ConvertError], None]) -> None:
        """Run an operation that uses the node group; errors name ranks of the whole group."""
        number = self._enter(head)

        def convert(error: Exception) -> CollectiveError:
            self._leave_node_group()  # before the slow search: ends waits of ranks on this node
            return self._failed(head.name, error, number=number)

        try:
            operation(convert)
        except MismatchError as error:
            self._disconnect()  # the other nodes wait for this one
            raise self._with_group_ranks(error) from None
        except (CollectiveError, RuntimeError) as error:
            raise convert(error) from None
        finally:
            self._count_node_traffic()

    def _run_message(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except CollectiveError as error:
            raise self._with_group_ranks(error) from None
        finally:
            self._count_node_traffic()

    def _with_group_ranks(self, error: CollectiveError) -> CollectiveError:
        """Convert the ranks of a node group's error to ranks of this group."""
        missing = tuple(self._local[local_rank] for local_rank in error.missing)
        cause = f"{error.cause} (on one node, where 0.. are ranks {self._local})"
        return type(error)(self.name, error.operation, error.number, missing, cause)

    @override
    def _abort(self) -> None:
        if self._node_group is not None:
            self._node_group.abort()
        super()._abort()

    @override
    def _leave(self) -> None:
        self._leave_node_group()
        super()._leave()
        self._queue.close(_CLOSE_S)

    def _leave_node_group(self) -> None:
        with self._lock:
            in_node_group, self._in_node_group = self._in_node_group, False
        if in_node_group and self._node_group is not None:
            self._node_group.close()

    def _count_node_traffic(self) -> None:
        """Add the node group's traffic since the last call."""
        if self._node_group is None:
            return
        with self._lock:
            new, old = replace(self._node_group.traffic), self._counted
            self._counted = new
            self._meter.add(
                new.sent_bytes - old.sent_bytes,
                new.received_bytes - old.received_bytes,
                new.waiting_s - old.waiting_s,
                new.working_s - old.working_s,
            )
