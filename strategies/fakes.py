"""
The port `Collective` in memory: N ranks as threads of one process, with faults on request.

For tests of strategies without Ray, for `num_workers: 0`, and for users who test their own
strategy. They keep the contract of `strategies/collective.py`: sums in rank order, deadlines,
errors that name the ranks that are missing, or in another operation. Servers of parameters and of
tables and the task scheduler have no fake: the real ones run in this process as well
(`actors/local_actors.py`).
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
"""How often who waits for a message looks round."""


class InMemoryRunStore(RunStore):
    """One dictionary for all ranks."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    @override
    def first(self, name: str, value: bytes) -> bytes:
        return self._values.setdefault(name, value)


class Fabric:
    """
    What connects the ranks of one in-memory world. Make one, hand each thread its `collective`.

    Args:
        world: number of ranks.
        timeout_s: deadline of every operation.
    """

    def __init__(self, world: int, timeout_s: float = 10.0) -> None:
        self.world, self.timeout_s = world, timeout_s
        self._changed = threading.Condition()
        self._rounds: dict[tuple[str, int], dict[int, tuple[str, Tensor | None]]] = defaultdict(
            dict
        )
        self._mail: dict[tuple[str, int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
        self._dead_after: dict[int, tuple[int, str]] = {}
        self._given_up = threading.Event()

    def collective(self, rank: int) -> InMemoryCollective:
        """Give rank's end of the group of all ranks."""
        return InMemoryCollective(self, "world", list(range(self.world)), rank)

    def kill(self, rank: int, *, after: int, group: str = "") -> None:
        """
        Inject a fault: `rank` never comes to its operation number `after` (from 0) of a group.

        Args:
            rank: of the world.
            after: operations are counted in each group.
            group: what the group's name begins with; "": any group.
        """
        self._dead_after[rank] = after, group

    def give_up(self) -> None:
        """End all waits, as when an attempt is called off; what is complete stays so."""
        self._given_up.set()
        with self._changed:
            self._changed.notify_all()

    def wait_for_mail(self, mailbox: queue.Queue[Tensor]) -> Tensor | None:
        """Give the next message; None: it did not come in time, or the attempt was called off."""
        deadline = time.monotonic() + self.timeout_s
        while not self._given_up.is_set() and time.monotonic() < deadline:
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
        gift: Tensor | None,
    ) -> Callable[[], list[Tensor | None]]:
        """
        Leave `gift`; give what waits for all ranks of the group, for their gifts in rank order.

        Raises:
            CollectiveError: this rank was killed, or, when waited for, somebody is late.
            MismatchError: when waited for: somebody came with another operation.
        """
        after, prefix = self._dead_after.get(me, (number + 1, ""))
        if after <= number and group.rpartition("/")[2].startswith(prefix):
            killed = (ranks.index(me),)
            raise CollectiveError(group, operation, number, killed, "this rank was killed")
        with self._changed:
            round_ = self._rounds[group, number]
            round_[me] = operation, gift
            if len(round_) == len(ranks):
                del self._rounds[group, number]  # the others have `met` in hand
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
            complete_or_over = partial(self._over, round_, len(ranks))
            self._changed.wait_for(complete_or_over, self.timeout_s)
            if len(round_) < len(ranks):
                missing = tuple(index for index, rank in enumerate(ranks) if rank not in round_)
                cause = f"waited {self.timeout_s:g} s"
                raise CollectiveError(group, operation, number, missing, cause)
        _check_alike(group, operation, number, [round_[rank][0] for rank in ranks])
        return [round_[rank][1] for rank in ranks]

    def _over(self, met: dict[int, tuple[str, Tensor | None]], ranks: int) -> bool:
        return len(met) == ranks or self._given_up.is_set()

    def mailbox(self, group: str, source: int, to: int) -> queue.Queue[Tensor]:
        """Give the queue of messages from one rank to another."""
        with self._changed:
            return self._mail[group, source, to]


def _check_alike(group: str, operation: str, number: int, called: Sequence[str]) -> None:
    """Raise `MismatchError` where ranks have called other operations than most."""
    most = Counter(called).most_common(1)[0][0]
    differ = tuple(index for index, one in enumerate(called) if one != most)
    if differ:
        indices = {one: [n for n, other in enumerate(called) if other == one] for one in called}
        text = "; ".join(f"{ranks_text(who)} in {one}" for one, who in indices.items())
        raise MismatchError(group, operation, number, differ, text)


class _Done:
    """A handle whose operation is over."""

    def wait(self) -> None:
        """Return at once."""


class _Started:
    """A handle whose operation ends when it is waited for."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


class InMemoryCollective(Collective):
    """One rank's end of a group (see `Collective`)."""

    def __init__(self, fabric: Fabric, name: str, members: list[int], me: int) -> None:
        self._fabric, self._name, self._members, self._me = fabric, name, members, me
        self._number = 0
        self._traffic = Traffic()

    @property
    @override
    def traffic(self) -> Traffic:
        return self._traffic

    @property
    def rank(self) -> int:
        """Number in the group, from 0."""
        return self._members.index(self._me)

    @property
    def world(self) -> int:
        """Ranks in the group."""
        return len(self._members)

    def _start(self, operation: str, gift: Tensor | None) -> Callable[[], list[Tensor]]:
        number, self._number = self._number, self._number + 1
        # A copy: the giver may go on and write into its tensor while others still read.
        copy = None if gift is None else gift.clone()
        wait = self._fabric.start(self._name, operation, number, self._members, self._me, copy)
        return lambda: [gift for gift in wait() if gift is not None]

    def _rendezvous(self, operation: str, gift: Tensor | None) -> list[Tensor]:
        return self._start(operation, gift)()

    @override
    def share(self, like: Tensor) -> Tensor:
        """Here every vector is as near as any other."""
        return torch.zeros_like(like)

    def _count(self, sent: int, received: int) -> None:
        self._traffic.sent_bytes += sent
        self._traffic.received_bytes += received

    @override
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Counted as the ring does it."""
        self._start_all_reduce(tensor, op)()

    @property
    @override
    def start_waits(self) -> bool:
        return False

    @override
    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        """Who waits for it adds."""
        return _Started(self._start_all_reduce(tensor, op))

    def _start_all_reduce(self, tensor: Tensor, op: ReduceOp) -> Callable[[], None]:
        gifts = self._start("all_reduce", tensor)

        def wait() -> None:
            _combine(gifts(), op, tensor)
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
        own_bytes, others = inputs[self.rank].nbytes, self.world - 1
        self._count(sum(t.nbytes for t in inputs) - own_bytes, own_bytes * others)

    @override
    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        for output, given in zip(outputs, self._rendezvous("all_gather", tensor), strict=True):
            output.copy_(given)
        self._count(
            tensor.nbytes * (self.world - 1), sum(t.nbytes for t in outputs) - tensor.nbytes
        )

    @override
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        tensor.copy_(self._rendezvous("broadcast", tensor)[source])
        here = self.rank == source
        self._count(tensor.nbytes * (self.world - 1) * here, tensor.nbytes * (not here))

    @override
    def send(self, tensor: Tensor, to: int) -> None:
        """Does not wait for the receiver."""
        mailbox = self._fabric.mailbox(self._name, self._me, self._members[to])
        mailbox.put(tensor.clone())
        self._count(tensor.nbytes, 0)

    @override
    def start_send(self, tensor: Tensor, to: int) -> Handle:
        """Done when this returns."""
        self.send(tensor, to)
        return _Done()

    @override
    def recv(self, tensor: Tensor, source: int) -> None:
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
    """Combine in rank order into `out`."""
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
