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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from distplat.actors.collectives.group import summed
from distplat.actors.collectives.header import Header, header
from distplat.actors.collectives.rendezvous import GroupMember, delete_locations, exchange_locations
from distplat.actors.collectives.shm.shm_group import ShmGroup
from distplat.actors.collectives.torch_group import Fail, TorchGroup, nothing
from distplat.actors.collectives.torch_store import run_unless_given_up
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
        member: which rank, of which group.

    Raises:
        DeadlineExceeded: somebody did not come in `settings.rendezvous_s`.
        CollectiveError: the group broke while it formed, or this rank was told to give up.
    """

    def __init__(self, member: GroupMember) -> None:
        super().__init__(member)
        self._node_group: ShmGroup | None = None  #: this node's ranks, if there are several
        self._ring: Any = None  #: the leaders, if this rank is one of several
        self._queue = OpQueue(f"hierarchical {self.name}")
        self._counted = Traffic()
        self._lock = threading.Lock()
        self._in_node = True
        try:
            self._find_neighbours(member)
        except BaseException:
            self.close()
            raise

    def _find_neighbours(self, member: GroupMember) -> None:
        asks = member.locations is None  # made by Ray's own call
        self._nodes = by_node(member.locations or exchange_locations(member))
        self._node = next(n for n, ranks in enumerate(self._nodes) if self.rank in ranks)
        self._local = self._nodes[self._node]
        if len(self._local) > 1:
            self._node_group = self._join_node(f"{self.name}#node-{self._node}")
        if len(self._nodes) > 1 and self.rank == self._local[0]:
            self._ring = self._connect_leaders()
        super().barrier()
        if asks and self.rank == 0:
            delete_locations(self.name)

    def _join_node(self, name: str) -> ShmGroup:
        try:
            local_rank = self._local.index(self.rank)
            return ShmGroup(GroupMember(name, local_rank, len(self._local), self.settings))
        except DeadlineExceeded as error:
            named = {f"worker-{n}": f"worker-{rank}" for n, rank in enumerate(self._local)}
            missing = tuple(named.get(who, who) for who in error.missing)
            raise DeadlineExceeded(error.what, missing, error.seconds, error.setting) from None

    def _connect_leaders(self) -> Any:
        connect = partial(self._connect, self._store, "leaders", self._node, len(self._nodes))
        ring = run_unless_given_up(connect, self.name, self.settings)
        self._connections.append(ring)
        return ring[0]

    def share(self, like: Tensor) -> Tensor:
        """Give zeros like `like`, shared with the ranks of this node."""
        return super().share(like) if self._node_group is None else self._node_group.share(like)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Combine in place."""
        self._queue.run(partial(self._all_reduce, tensor, op))

    @property
    def start_waits(self) -> bool:
        """The group's thread waits, not the caller."""
        return False

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        """Begin to combine in place; the group's thread does it."""
        return self._queue.submit(partial(self._all_reduce, tensor, op))

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Copy the source's tensor to all."""
        self._queue.run(partial(self._broadcast, tensor, source))

    def _start(
        self,
        head: Header,
        begin: Callable[[], Sequence[Any]],
        moved: tuple[int, int] = (0, 0),
        after: Callable[[], None] = nothing,
        *,
        overlaps: bool = False,
    ) -> Work:
        """What goes over gloo alone has its turn among the others, and is over then."""
        start = partial(super()._start, head, begin, moved, after)
        self._queue.run(lambda: start().wait())
        return Work()

    def start_send(self, tensor: Tensor, to: int) -> Work:
        """Begin to send to one rank, by memory if it is near; then it is done at once."""
        if self._node_group is None or to not in self._local:
            return super().start_send(tensor, to)
        self._message(partial(self._node_group.send, tensor, self._local.index(to)))
        return Work()

    def recv(self, tensor: Tensor, source: int) -> None:
        """Receive from one rank, by memory if it is near."""
        if self._node_group is None or source not in self._local:
            super().recv(tensor, source)
            return
        self._message(partial(self._node_group.recv, tensor, self._local.index(source)))

    def _all_reduce(self, tensor: Tensor, op: ReduceOp) -> None:
        step = max(1, BLOCK_BYTES // tensor.itemsize)
        flat = tensor.view(-1)
        blocks = [flat[at : at + step] for at in range(0, flat.numel(), step)]
        node_group = self._node_group

        def work(fail: Fail) -> None:
            rings = []
            for block in blocks:
                if node_group is not None:
                    node_group.reduce(block, summed(op), 0)
                if self._ring is not None:
                    moved = traffic_elements(block.numel(), self._node, len(self._nodes))
                    sent, received = (elements * block.itemsize for elements in moved)
                    ring = torch_compat.all_reduce(self._ring, block, summed(op))
                    rings.append(self._work([ring], fail, (sent, received)))
            for number, block in enumerate(blocks):
                if rings:
                    rings[number].wait()
                if node_group is not None:
                    node_group.broadcast(block)

        self._perform(header("all_reduce", [tensor], op), work)
        self._average(tensor, op)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        source_node = next(n for n, ranks in enumerate(self._nodes) if source in ranks)
        is_source_node, nodes = source_node == self._node, len(self._nodes)
        first = self._local.index(source) if is_source_node else 0

        def work(fail: Fail) -> None:
            # Where the source is: first to the leader, and to all on the way.
            if is_source_node and self._node_group is not None:
                self._node_group.broadcast(tensor, first)
            if self._ring is not None and tensor.numel():
                moved = (tensor.nbytes * (nodes - 1), 0) if is_source_node else (0, tensor.nbytes)
                ring = torch_compat.broadcast(self._ring, tensor, source_node)
                self._work([ring], fail, moved).wait()
            if not is_source_node and self._node_group is not None:
                self._node_group.broadcast(tensor, first)

        self._perform(header("broadcast", [tensor], root=source), work)

    def _perform(self, head: Header, work: Callable[[Fail], None]) -> None:
        """Do an operation that begins or ends inside the nodes; errors name ranks of all nodes."""
        number = self._enter(head)

        def fail(error: Exception) -> CollectiveError:
            self._leave_node()  # before the search, which takes time: who is near shall not wait
            return self._failed(head.name, error, number=number)

        try:
            work(fail)
        except MismatchError as error:
            self._cut()  # the other nodes wait for this one
            raise self._with_group_ranks(error) from None
        except (CollectiveError, RuntimeError) as error:
            raise fail(error) from None
        finally:
            self._account()

    def _message(self, work: Callable[[], None]) -> None:
        try:
            work()
        except CollectiveError as error:
            raise self._with_group_ranks(error) from None
        finally:
            self._account()

    def _with_group_ranks(self, error: CollectiveError) -> CollectiveError:
        """Name the ranks by their ranks in this group."""
        missing = tuple(self._local[local_rank] for local_rank in error.missing)
        cause = f"{error.cause} (on one node, where 0.. are ranks {self._local})"
        return type(error)(self.name, error.operation, error.number, missing, cause)

    def _abort(self) -> None:
        if self._node_group is not None:
            self._node_group.abort()
        super()._abort()

    def _leave(self) -> None:
        self._leave_node()
        super()._leave()
        self._queue.close(_CLOSE_S)

    def _leave_node(self) -> None:
        with self._lock:
            stays, self._in_node = self._in_node, False
        if stays and self._node_group is not None:
            self._node_group.close()

    def _account(self) -> None:
        """Count what went through this node's memory."""
        if self._node_group is None:
            return
        with self._lock:
            now, last = replace(self._node_group.traffic), self._counted
            self._counted = now
            self._meter.add(
                now.sent_bytes - last.sent_bytes,
                now.received_bytes - last.received_bytes,
                now.waiting_s - last.waiting_s,
                now.working_s - last.working_s,
            )
