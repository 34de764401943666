"""
The port `Collective` in memory: N ranks as threads of one process, with fault injection.

Used by tests of strategies without Ray, by `num_workers: 0`, and by users who test their own
strategy. These classes keep the contract of `strategies/collective.py`: sums in rank order,
timeouts, and errors that name the ranks that are missing or in another operation. Parameter
servers, embedding servers and the task scheduler have no fake: the real ones also run within one
process (`actors/local_actors.py`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from distplat.platform.errors import CollectiveError, MismatchError, ranks_text
from distplat.strategies.algorithms.reduce import sum_in_order, traffic_elements
from distplat.strategies.collective import Collective, Handle, ReduceOp, Traffic
from distplat.strategies.ports import RunStore

_SLICE_S = 0.05
"""Interval at which a receiver checks whether the group was aborted."""


class InMemoryRunStore(RunStore):
    """A store in one dictionary shared by all ranks."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    @override
    def first(self, name: str, value: bytes) -> bytes:
        return self._values.setdefault(name, value)


class Fabric:
    """
    The shared state of the ranks of one in-memory world. Create one, and pass each thread its
    `collective`.

    Args:
        world: number of ranks.
        timeout_s: timeout of every operation.
    """

    def __init__(self, world: int, timeout_s: float = 10.0) -> None:
        self.world, self.timeout_s = world, timeout_s
        self._changed = threading.Condition()
        self._rounds: dict[tuple[str, int], dict[int, tuple[str, Tensor | None]]] = defaultdict(
            dict
        )
        self._mail: dict[tuple[str, int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
        self._dead_after: dict[int, tuple[int, str]] = {}
        self._messages_left: dict[int, int] = {}  #: rank -> messages until it is killed
        self._aborted = threading.Event()

    def collective(self, rank: int) -> InMemoryCollective:
        """Return a rank's handle of the group of all ranks."""
        return InMemoryCollective(self, "world", list(range(self.world)), rank)

    def kill(self, rank: int, *, after: int, group: str = "") -> None:
        """
        Inject a fault: `rank` never reaches its operation number `after` (from 0) of a group.

        Args:
            rank: rank in the world.
            after: operation number, counted separately in each group.
            group: prefix of the group's name; "": any group.
        """
        self._dead_after[rank] = after, group

    def kill_at_message(self, rank: int, *, after: int) -> None:
        """Inject a fault: `rank` never sends or receives its message number `after` (from 0)."""
        self._messages_left[rank] = after

    def count_message(self, group: str, me: int, group_rank: int) -> None:
        """
        Count a message that a rank is about to send or receive.

        Args:
            group: name of its group.
            me: rank in the world.
            group_rank: rank in the group.

        Raises:
            CollectiveError: This rank was killed.
        """
        if me in self._messages_left:
            self._messages_left[me] -= 1
            if self._messages_left[me] < 0:
                raise CollectiveError(group, "message", 0, (group_rank,), "this rank was killed")

    def abort(self) -> None:
        """
        End all waits, as when an attempt is aborted. Operations that all ranks have reached still
        succeed.
        """
        self._aborted.set()
        with self._changed:
            self._changed.notify_all()

    def wait_for_mail(self, mailbox: queue.Queue[Tensor]) -> Tensor | None:
        """Return the next message; None: timeout, or the attempt was aborted."""
        deadline = time.monotonic() + self.timeout_s
        while not self._aborted.is_set() and time.monotonic() < deadline:
            with suppress(queue.Empty):
                return mailbox.get(timeout=min(_SLICE_S, self.timeout_s))
        return None

    def start(
        self,
        group: str,
        operation: str,
        number: int,
        ranks: Sequence[int],
        me: int,
        contribution: Tensor | None,
    ) -> Callable[[], list[Tensor | None]]:
        """
        Contribute a tensor to an operation, and return a function that waits for all ranks.

        The function returns the tensors of all ranks in rank order.

        Raises:
            CollectiveError: This rank was killed. Raised by the function: a rank is late.
            MismatchError: Raised by the function: a rank called another operation.
        """
        after, prefix = self._dead_after.get(me, (number + 1, ""))
        if after <= number and group.rpartition("/")[2].startswith(prefix):
            killed = (ranks.index(me),)
            raise CollectiveError(group, operation, number, killed, "this rank was killed")
        with self._changed:
            round_ = self._rounds[group, number]
            round_[me] = operation, contribution
            if len(round_) == len(ranks):
                del self._rounds[group, number]  # the other ranks hold a reference to `round_`
            self._changed.notify_all()
        return partial(self._wait, group, operation, number, ranks, round_)

    def _wait(
        self,
        group: str,
        operation: str,
        number: int,
        ranks: Sequence[int],
        round_: dict[int, tuple[str, Tensor | None]],
    ) -> list[Tensor | None]:
        with self._changed:
            is_over = partial(self._is_over, round_, len(ranks))
            self._changed.wait_for(is_over, self.timeout_s)
            if len(round_) < len(ranks):
                missing = tuple(index for index, rank in enumerate(ranks) if rank not in round_)
                cause = f"waited {self.timeout_s:g} s"
                raise CollectiveError(group, operation, number, missing, cause)
        _check_same_operation(group, operation, number, [round_[rank][0] for rank in ranks])
        return [round_[rank][1] for rank in ranks]

    def _is_over(self, round_: dict[int, tuple[str, Tensor | None]], ranks: int) -> bool:
        return len(round_) == ranks or self._aborted.is_set()

    def mailbox(self, group: str, source: int, to: int) -> queue.Queue[Tensor]:
        """Return the queue of messages from one rank to another."""
        with self._changed:
            return self._mail[group, source, to]


def _check_same_operation(
    group: str, operation: str, number: int, operations: Sequence[str]
) -> None:
    """Raise `MismatchError` if some ranks called another operation than the majority."""
    majority = Counter(operations).most_common(1)[0][0]
    deviating = tuple(rank for rank, name in enumerate(operations) if name != majority)
    if deviating:
        ranks_of = {
            name: [rank for rank, other in enumerate(operations) if other == name]
            for name in operations
        }
        text = "; ".join(f"{ranks_text(ranks)} in {name}" for name, ranks in ranks_of.items())
        raise MismatchError(group, operation, number, deviating, text)


class _Done:
    """A handle of a completed operation."""

    def wait(self) -> None:
        """Return immediately."""


class _Started:
    """A handle of an operation that completes in `wait`."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


class InMemoryCollective(Collective):
    """One rank's handle of a group (see `Collective`)."""

    def __init__(self, fabric: Fabric, name: str, members: list[int], me: int) -> None:
        self._fabric, self._name, self._members, self._me = fabric, name, members, me
        self._number = 0
        self._traffic = Traffic()

    @property
    @override
    def traffic(self) -> Traffic:
        return self._traffic

    @property
    @override
    def rank(self) -> int:
        """Number in the group, from 0."""
        return self._members.index(self._me)

    @property
    @override
    def world(self) -> int:
        """Ranks in the group."""
        return len(self._members)

    def _start(self, operation: str, contribution: Tensor | None) -> Callable[[], list[Tensor]]:
        number, self._number = self._number, self._number + 1
        # A copy: this rank may overwrite its tensor while other ranks still read it.
        copy = None if contribution is None else contribution.clone()
        wait = self._fabric.start(self._name, operation, number, self._members, self._me, copy)
        return lambda: [contribution for contribution in wait() if contribution is not None]

    def _rendezvous(self, operation: str, contribution: Tensor | None) -> list[Tensor]:
        return self._start(operation, contribution)()

    @override
    def share(self, like: Tensor) -> Tensor:
        """Return an ordinary tensor: all memory of the process is shared."""
        return torch.zeros_like(like)

    def _count(self, sent: int, received: int) -> None:
        self._traffic.sent_bytes += sent
        self._traffic.received_bytes += received

    @override
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """The traffic is counted as in a ring all-reduce."""
        self._start_all_reduce(tensor, op)()

    @property
    @override
    def start_waits(self) -> bool:
        return False

    @override
    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        """The reduction runs in `wait`."""
        return _Started(self._start_all_reduce(tensor, op))

    def _start_all_reduce(self, tensor: Tensor, op: ReduceOp) -> Callable[[], None]:
        contributions = self._start("all_reduce", tensor)

        def wait() -> None:
            _combine(contributions(), op, tensor)
            sent, received = traffic_elements(tensor.numel(), self.rank, self.world)
            self._count(sent * tensor.itemsize, received * tensor.itemsize)

        return wait

    @override
    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        stacked = self._rendezvous("reduce_scatter", torch.cat([t.reshape(-1) for t in inputs]))
        start = sum(t.numel() for t in inputs[: self.rank])
        parts = [s[start : start + output.numel()].view(output.shape) for s in stacked]
        _combine(parts, op, output)
        own_bytes, peers = inputs[self.rank].nbytes, self.world - 1
        self._count(sum(t.nbytes for t in inputs) - own_bytes, own_bytes * peers)

    @override
    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        for output, source in zip(outputs, self._rendezvous("all_gather", tensor), strict=True):
            output.copy_(source)
        self._count(
            tensor.nbytes * (self.world - 1), sum(t.nbytes for t in outputs) - tensor.nbytes
        )

    @override
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        tensor.copy_(self._rendezvous("broadcast", tensor)[source])
        is_source = self.rank == source
        self._count(tensor.nbytes * (self.world - 1) * is_source, tensor.nbytes * (not is_source))

    @override
    def send(self, tensor: Tensor, to: int) -> None:
        """Does not wait for the receiver."""
        self._fabric.count_message(self._name, self._me, self.rank)
        mailbox = self._fabric.mailbox(self._name, self._me, self._members[to])
        mailbox.put(tensor.clone())
        self._count(tensor.nbytes, 0)

    @override
    def start_send(self, tensor: Tensor, to: int) -> Handle:
        """The message is already sent when this returns."""
        self.send(tensor, to)
        return _Done()

    @override
    def recv(self, tensor: Tensor, source: int) -> None:
        self._fabric.count_message(self._name, self._me, self.rank)
        mailbox = self._fabric.mailbox(self._name, self._members[source], self._me)
        arrived = self._fabric.wait_for_mail(mailbox)
        if arrived is None:
            cause = f"waited {self._fabric.timeout_s:g} s"
            raise CollectiveError(self._name, "recv", self._number, (source,), cause)
        tensor.copy_(arrived)
        self._count(0, tensor.nbytes)

    @override
    def barrier(self) -> None:
        self._rendezvous("barrier", None)

    @override
    def subgroup(self, name: str, ranks: Sequence[int]) -> Collective:
        members = [self._members[rank] for rank in ranks]
        return InMemoryCollective(self._fabric, f"{self._name}/{name}", members, self._me)


def _combine(parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
    """Reduce tensors in rank order into `out`."""
    if op in (ReduceOp.SUM, ReduceOp.AVG):
        sum_in_order([p.reshape(-1) for p in parts], out.view(-1))
        if op is ReduceOp.AVG:
            out.div_(len(parts))
        return
    pairwise: dict[ReduceOp, Callable[[Tensor, Tensor], Tensor]] = {
        ReduceOp.MIN: torch.minimum,
        ReduceOp.MAX: torch.maximum,
        ReduceOp.PRODUCT: torch.mul,
    }
    result = parts[0]
    for part in parts[1:]:
        result = pairwise[op](result, part)
    out.copy_(result)
