"""
Groups over torch's process groups, each with a private store: gloo, and NCCL beside gloo.

Ray's own gloo backend makes the first group the process's torch world; later groups repeat its
ranks, and an operation waits half an hour for a frozen peer. Here an operation ends after the
group's deadline, and the error names the ranks that are missing (`Heartbeat`). A group in which
an operation failed is broken: every later one fails at once.
(docs/decisions/private_gloo_groups.md)

    start                                                         wait
      count -> compare headers (the first ones) -> torch begins     torch ends -> account
                        |                                             |
                        v differ: MismatchError                       v fails: cut, compare, name
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distplat.actors.collectives.group import CollectiveGroup, summed
from distplat.actors.collectives.header import LENGTH, Header, check_headers, check_message, header
from distplat.actors.collectives.rendezvous import GIVEN_UP, GroupMember
from distplat.actors.collectives.torch_store import Heartbeat, Store, run_unless_given_up
from distplat.actors.collectives.work import Work
from distplat.platform.errors import CollectiveError, MismatchError
from distplat.strategies import torch_compat
from distplat.strategies.algorithms.reduce import traffic_elements
from distplat.strategies.collective import ReduceOp

COMPARED = 20
"""Number of a group's first operations that are compared between the ranks without `debug`."""

_PAYLOAD, _HEADER, _NOBODY = 0, 1, 2**31 - 1
"""Tags of messages; nobody sends with the last one."""

Fail = Callable[[Exception], CollectiveError]
"""Makes the error to raise out of torch's."""


def nothing() -> None:
    """Do nothing after an operation."""


class TorchGroup(CollectiveGroup):
    """
    One rank of a gloo group.

    Args:
        member: which rank, of which group.

    Raises:
        DeadlineExceeded: somebody did not come in `settings.rendezvous_s`.
        CollectiveError: the group broke while it formed, or this rank was told to give up.
    """

    def __init__(self, member: GroupMember) -> None:
        super().__init__(member)
        self._begun = 0  #: operations of all ranks
        self._message_count: dict[tuple[str, int], int] = {}
        self._failure: tuple[type[CollectiveError], tuple[int, ...], str] | None = None
        self._aborted = False
        # Gloo matches operations by their order: a thread must count and begin in one go.
        self._order_lock, self._failing = threading.RLock(), threading.Lock()
        self._connections: list[tuple[Any, int, int]] = []
        form = partial(self._form, member)
        self._store = run_unless_given_up(form, member.name, member.settings)
        self._heartbeat = Heartbeat(
            self._store.client, self.rank, self.world, lambda: self._begun, self._on_beat
        )

    @property
    def start_waits(self) -> bool:
        """The first operations wait for the others' headers."""
        return self._is_compared(self._begun + 1)

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        """Begin to combine in place; see `start_waits`."""
        sent, received = traffic_elements(tensor.numel(), self.rank, self.world)
        return self._start(
            header("all_reduce", [tensor], op),
            self._moving(torch_compat.all_reduce, tensor, summed(op)),
            (sent * tensor.itemsize, received * tensor.itemsize),
            partial(self._average, tensor, op),
            overlaps=True,
        )

    def reduce(self, tensor: Tensor, op: ReduceOp, root: int) -> None:
        """Combine into the root's tensor; the others' hold parts of sums then."""
        is_root = self.rank == root
        others = tensor.nbytes * (self.world - 1)
        self._start(
            header("reduce", [tensor], op, root=root),
            self._moving(torch_compat.reduce, tensor, summed(op), root),
            (0, others) if is_root else (tensor.nbytes, 0),
        ).wait()

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Copy the source's tensor to all."""
        others = tensor.nbytes * (self.world - 1)
        self._start(
            header("broadcast", [tensor], root=source),
            self._moving(torch_compat.broadcast, tensor, source),
            (others, 0) if self.rank == source else (0, tensor.nbytes),
        ).wait()

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """Copy every rank's tensor to all; sizes may be uneven."""
        # Gloo takes even sizes only. Sizes that differ by one element are what happens.
        longest = max(output.numel() for output in outputs)
        padded = tensor.new_empty(longest)
        padded[: tensor.numel()] = tensor.reshape(-1)
        table = tensor.new_empty(self.world, longest)

        def spread() -> None:
            for row, output in zip(table, outputs, strict=True):
                output.copy_(row[: output.numel()].view(output.shape))

        def gather() -> list[Any]:
            flat = table.view(-1)
            return [torch_compat.all_gather_even(self._gloo, flat, padded)] if longest else []

        self._start(
            header("all_gather", self._sizes(outputs, tensor)),
            gather,
            self._gathered(outputs, tensor),
            spread,
        ).wait()

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """Combine everybody's r-th input into the output of rank r; sizes may be uneven."""
        # Gloo's own takes even sizes only and moves as much as an all-reduce. A reduce to each
        # rank moves half of that; it writes into what it is given, so it is given copies.
        copies = [part.clone() for part in inputs]

        def begin() -> Sequence[Any]:
            reduce, how = torch_compat.reduce, summed(op)
            return [w for n, c in enumerate(copies) for w in self._moving(reduce, c, how, n)()]

        def keep() -> None:
            output.copy_(copies[self.rank])
            self._average(output, op)

        head = header("reduce_scatter", inputs, op)
        self._start(head, begin, self._scattered(inputs), keep).wait()

    def start_send(self, tensor: Tensor, to: int) -> Work:
        """Begin to send to one rank; the handle is done when the other has come for it."""
        number, compare = self._count_message("send", to)
        fail = partial(self._failed, "send", number=number, partner=to)
        works = []
        try:
            if compare:
                head = torch.tensor(header("send", [tensor], number=number))
                works.append(self._gloo.send([head], to, _HEADER))
            if tensor.numel():
                works.append(self._carrier(tensor).send([tensor], to, _PAYLOAD))
        except RuntimeError as error:
            raise fail(error) from None
        return self._work(works, fail, (tensor.nbytes, 0))

    def recv(self, tensor: Tensor, source: int) -> None:
        """Receive from one rank."""
        number, compare = self._count_message("recv", source)
        fail = partial(self._failed, "recv", number=number, partner=source)
        works = []
        try:
            if compare:
                self._compare_message(tensor, source, number)
            if tensor.numel():
                works.append(self._carrier(tensor).recv([tensor], source, _PAYLOAD))
        except RuntimeError as error:
            raise fail(error) from None
        self._work(works, fail, (0, tensor.nbytes)).wait()

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self._start(header("barrier"), lambda: [self._gloo.barrier()]).wait()

    def _form(self, member: GroupMember) -> Store:
        store = Store(member)
        self._connections.append(self._connect(store, "all", self.rank, self.world))
        return store

    def _connect(self, store: Store, purpose: str, rank: int, world: int) -> tuple[Any, int, int]:
        """Connect `world` of the ranks by gloo, of which this one has number `rank`."""
        limit = self.settings.operation_s
        try:
            group = torch_compat.gloo_group(store.client, purpose, rank, world, limit, store.host)
        except RuntimeError as error:
            cause = f"gloo says: {torch_compat.error_reason(error)}"
            raise CollectiveError(self.name, "rendezvous", 0, (), cause) from None
        return group, rank, world

    @property
    def _gloo(self) -> Any:
        return self._connections[0][0]

    def _carrier(self, tensor: Tensor) -> Any:
        """Give the process group that moves such a tensor."""
        return self._gloo

    def _moving(
        self, operation: Callable[..., Any], tensor: Tensor, *args: Any
    ) -> Callable[[], list[Any]]:
        """Give what begins one of torch's operations on a tensor; an empty one needs none."""
        return lambda: [operation(self._carrier(tensor), tensor, *args)] if tensor.numel() else []

    def _start(
        self,
        head: Header,
        begin: Callable[[], Sequence[Any]],
        moved: tuple[int, int] = (0, 0),
        after: Callable[[], None] = nothing,
        *,
        overlaps: bool = False,
    ) -> Work:
        """
        Begin an operation of all ranks.

        Args:
            head: what it is.
            begin: gives torch's works to wait for.
            moved: bytes that this rank (sends, receives).
            after: to be done when the works are over.
            overlaps: the caller may do something else before it waits.

        Raises:
            CollectiveError: see `Collective`.
        """
        with self._order_lock:
            number = self._enter(head)
            head = head._replace(number=number)
            fail = partial(self._failed, head.name, number=number, head=head)
            try:
                works = begin()
            except RuntimeError as error:
                raise fail(error) from None
            return self._work(works, fail, moved, after, overlaps=overlaps)

    def _work(
        self,
        works: Sequence[Any],
        fail: Fail,
        moved: tuple[int, int],
        after: Callable[[], None] = nothing,
        *,
        overlaps: bool = False,
    ) -> Work:
        """Give the handle of torch's works; their time counts until torch is done."""
        stop = self._meter.begin()
        if overlaps and works:
            self._when_done(works[-1], stop)

        def finish() -> None:
            try:
                for work in works:
                    self._wait(work)
            except RuntimeError as error:
                raise fail(error) from None
            stop()
            self._meter.end(*moved)
            after()

        return Work(finish)

    def _wait(self, work: Any) -> None:
        """Return when one of torch's works is over; `RuntimeError` if it failed or is late."""
        work.wait()

    def _when_done(self, work: Any, callback: Callable[[], None]) -> None:
        """Have a function called when one of torch's works is over, as far as torch tells."""
        torch_compat.when_done(work, callback)

    def _enter(self, head: Header) -> int:
        """Count an operation of all ranks, compare it with theirs if it is time; its number."""
        with self._order_lock:
            self._begun += 1
            number = self._begun
            self._refuse_if_broken(head.name, number)
            if self._is_compared(number):
                self._compare(head._replace(number=number))
            return number

    def _is_compared(self, number: int) -> bool:
        """Say whether an operation of all ranks begins by comparing headers."""
        return self.world > 1 and (self.settings.debug or number <= COMPARED)

    def _compare(self, head: Header) -> None:
        table = torch.empty(self.world * LENGTH, dtype=torch.int64)
        try:
            with self._meter.waiting():
                torch_compat.all_gather_even(self._gloo, table, torch.tensor(head)).wait()
        except RuntimeError as error:
            raise self._failed(head.name, error, number=head.number) from None
        headers = [Header(*row) for row in table.view(self.world, LENGTH).tolist()]
        check_headers(self.name, self.rank, headers)

    def _count_message(self, operation: str, partner: int) -> tuple[int, bool]:
        number = self._message_count.get((operation, partner), 0) + 1
        self._message_count[operation, partner] = number
        self._refuse_if_broken(operation, number)
        return number, self.settings.debug or number <= COMPARED

    def _compare_message(self, tensor: Tensor, source: int, number: int) -> None:
        other_header = torch.empty(LENGTH, dtype=torch.int64)
        with self._meter.waiting():
            self._gloo.recv([other_header], source, _HEADER).wait()
        sent, expected = Header(*other_header.tolist()), header("send", [tensor], number=number)
        try:
            check_message(self.name, source, self.rank, sent, expected)
        except MismatchError:
            self._cut()  # the sender waits for somebody to take its message
            raise

    def _failed(
        self,
        operation: str,
        error: Exception,
        *,
        number: int,
        partner: int | None = None,
        head: Header | None = None,
    ) -> CollectiveError:
        """Find the missing ranks, once for all pending operations; give the error."""
        with self._failing:
            if self._failure is None:
                self._cut()  # nobody shall wait for this rank
                still_s = self._heartbeat.stood_still_s()
                says = "" if head is None else " ".join(map(str, head))
                missing = self._heartbeat.missing(number, partner, lambda: self._given_up, says)
                why = f"torch says: {torch_compat.error_reason(error)}"
                if isinstance(error, CollectiveError):  # of a group inside this one
                    why = error.cause
                cause = f"{self.settings.deadline}; {why}"
                if still_s:
                    was = f"this process stood still for {still_s:.0f} s"
                    cause = f"{was} (stopped, or without a processor); {cause}"
                self._failure = self._header_mismatch() or (CollectiveError, missing, cause)
                if self._given_up:
                    self._failure = CollectiveError, (), GIVEN_UP
        kind, missing, cause = self._failure
        return kind(self.name, operation, number, missing, cause)

    def _header_mismatch(self) -> tuple[type[CollectiveError], tuple[int, ...], str] | None:
        """Say that ranks were in different operations, which are compared only now."""
        heads = [Header(*map(int, one.split())) for one in self._heartbeat.said]
        if len({one.number for one in heads}) > 1:
            return None  # some were done with what failed elsewhere
        try:
            check_headers(self.name, self.rank, heads)
        except MismatchError as error:
            return MismatchError, error.missing, error.cause
        return None

    @property
    def _given_up(self) -> bool:
        """Whether this rank's group was aborted, or the attempt abandoned."""
        return self._aborted or self.settings.abandoned.is_set()

    def _abort(self) -> None:
        self._aborted = True
        self._cut()

    def _cut(self) -> None:
        """
        Break all connections, so that this rank's operations and those of its peers end.

        `ProcessGroupGloo.abort` leaves them waiting. But gloo breaks all pairs of a context when
        one operation in it times out, so one that nobody answers is given a millisecond.
        """
        for group, rank, world in list(self._connections):
            for peer in (other for other in range(world) if other != rank):
                with suppress(RuntimeError):
                    group.recv([torch.empty(1)], peer, _NOBODY).wait(timedelta(milliseconds=1))

    def _leave(self) -> None:
        """Close the connections; what is under way ends."""
        troubled = bool(self._meter.under_way or self._failure or self._given_up)
        if troubled:
            self._cut()
        self._heartbeat.stop()
        self._failure = self._failure or (CollectiveError, (), "this rank has left the group")
        self._connections.clear()
        self._store.close(troubled=troubled)

    def _refuse_if_broken(self, operation: str, number: int) -> None:
        if self._failure is None and self._given_up:
            self._failure = CollectiveError, (), GIVEN_UP
        if self._failure is not None:
            kind, missing, cause = self._failure
            raise kind(self.name, operation, number, missing, cause)

    def _on_beat(self) -> None:
        if self._given_up:
            self._cut()

    def _sizes(self, outputs: Sequence[Tensor], tensor: Tensor) -> list[Tensor]:
        """Give one tensor per rank whose sizes all ranks must agree on."""
        return [*outputs[: self.rank], tensor, *outputs[self.rank + 1 :]]

    def _gathered(self, outputs: Sequence[Tensor], tensor: Tensor) -> tuple[int, int]:
        """Give the bytes that an all-gather (sends, receives)."""
        received = sum(output.nbytes for output in outputs) - tensor.nbytes
        return tensor.nbytes * (self.world - 1), received

    def _scattered(self, inputs: Sequence[Tensor]) -> tuple[int, int]:
        """Give the bytes that a reduce-scatter (sends, receives)."""
        own_bytes = inputs[self.rank].nbytes
        return sum(part.nbytes for part in inputs) - own_bytes, own_bytes * (self.world - 1)


class NcclGroup(TorchGroup):
    """
    One rank of an NCCL group; each has a whole GPU.

    NCCL moves what is on the GPU. Gloo moves the rest, compares headers and finds who is missing.
    It has not been run: no machine with several GPUs was at hand.
    """

    _nccl: Any = None

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """Copy every rank's tensor to all; sizes may be uneven."""
        if not tensor.is_cuda:
            super().all_gather(outputs, tensor)
            return
        head = header("all_gather", self._sizes(outputs, tensor))
        flat = [output.view(-1) for output in outputs]
        begin = partial(torch_compat.all_gather, self._nccl, flat, tensor.reshape(-1))
        self._start(head, lambda: [begin()], self._gathered(outputs, tensor)).wait()

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """Combine everybody's r-th input into the output of rank r; sizes may be uneven."""
        if not output.is_cuda:
            super().reduce_scatter(output, inputs, op)
            return
        head, flat = header("reduce_scatter", inputs, op), [part.view(-1) for part in inputs]
        begin = partial(torch_compat.reduce_scatter, self._nccl, output.view(-1), flat, summed(op))
        after = partial(self._average, output, op)
        self._start(head, lambda: [begin()], self._scattered(inputs), after).wait()

    def _form(self, member: GroupMember) -> Store:
        store, limit_s = super()._form(member), self.settings.operation_s
        client, rank, world = store.client, self.rank, self.world
        self._nccl = torch_compat.nccl_group(client, "nccl", rank, world, limit_s)
        return store

    def _carrier(self, tensor: Tensor) -> Any:
        return self._nccl if tensor.is_cuda else self._gloo

    def _wait(self, work: Any) -> None:
        # With a deadline, wait blocks until the GPU is done; without, it only orders streams.
        work.wait(timedelta(seconds=self.settings.operation_s))
        if self._given_up or self._failure is not None:
            raise RuntimeError("the communicators were aborted")  # the values are not good

    def _when_done(self, work: Any, callback: Callable[[], None]) -> None:
        """Do nothing: torch calls back when NCCL's operation is queued, not when it is over."""

    def _cut(self) -> None:
        super()._cut()
        if self._nccl is not None:
            self._nccl.abort()

    def _leave(self) -> None:
        super()._leave()
        nccl, self._nccl = self._nccl, None
        if nccl is not None:  # after `_cut` this ends at once, else with what is under way
            nccl.shutdown()
