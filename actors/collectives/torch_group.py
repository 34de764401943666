"""
Groups over torch's process groups, each with a private store: gloo, and NCCL with gloo.

Ray's own gloo backend makes the first group the process's default group; later groups have the same
ranks, and an operation waits half an hour for a frozen peer. Here an operation fails after the
group's deadline, and the error names the missing ranks (`Heartbeat`). After a failed operation the
group is broken: all later operations fail at once. (docs/decisions/private_gloo_groups.md)

    start                                                         wait
      count -> compare headers (first operations) -> torch starts   torch ends -> count traffic
                        |                                             |
                        v differ: MismatchError                       v fails: disconnect, find
                                                                        missing ranks, raise
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distplat.actors.collectives.group import CollectiveGroup, sum_for_avg
from distplat.actors.collectives.header import LENGTH, Header, check_headers, check_message, header
from distplat.actors.collectives.rendezvous import GIVEN_UP, GroupMember
from distplat.actors.collectives.torch_store import Heartbeat, Store, run_until_abandoned
from distplat.actors.collectives.work import Work
from distplat.platform.errors import CollectiveError, MismatchError
from distplat.strategies import torch_compat
from distplat.strategies.algorithms.reduce import traffic_elements
from distplat.strategies.collective import ReduceOp

COMPARED = 20
"""Number of a group's first operations whose headers are compared even without `debug`."""

_PAYLOAD, _HEADER, _UNUSED = 0, 1, 2**31 - 1
"""Tags of messages; no rank sends with the last one."""

ConvertError = Callable[[Exception], CollectiveError]
"""Converts an error of torch to the error to raise."""


def do_nothing() -> None:
    """Do nothing after an operation."""


class TorchGroup(CollectiveGroup):
    """
    One rank of a gloo group.

    Args:
        member: the rank and its group.

    Raises:
        DeadlineExceeded: a rank did not join within `settings.rendezvous_s`.
        CollectiveError: the group broke while it formed, or `settings.abandoned` was set.
    """

    def __init__(self, member: GroupMember) -> None:
        super().__init__(member)
        self._started = 0  #: operations of all ranks that this rank has started
        self._message_count: dict[tuple[str, int], int] = {}
        self._failure: tuple[type[CollectiveError], tuple[int, ...], str] | None = None
        self._aborted = False
        # Gloo matches operations by their order, so counting and starting must be atomic.
        self._order_lock, self._failing = threading.RLock(), threading.Lock()
        self._connections: list[tuple[Any, int, int]] = []
        form = partial(self._form, member)
        self._store = run_until_abandoned(form, member.name, member.settings)
        self._heartbeat = Heartbeat(
            self._store.client, self.rank, self.world, lambda: self._started, self._on_beat
        )

    @property
    @override
    def start_waits(self) -> bool:
        """The first operations wait for the headers of all ranks."""
        return self._is_compared(self._started + 1)

    @override
    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        sent, received = traffic_elements(tensor.numel(), self.rank, self.world)
        return self._start(
            header("all_reduce", [tensor], op),
            self._starter(torch_compat.all_reduce, tensor, sum_for_avg(op)),
            (sent * tensor.itemsize, received * tensor.itemsize),
            partial(self._average, tensor, op),
            overlaps=True,
        )

    @override
    def reduce(self, tensor: Tensor, op: ReduceOp, root: int) -> None:
        is_root = self.rank == root
        peer_bytes = tensor.nbytes * (self.world - 1)
        self._start(
            header("reduce", [tensor], op, root=root),
            self._starter(torch_compat.reduce, tensor, sum_for_avg(op), root),
            (0, peer_bytes) if is_root else (tensor.nbytes, 0),
        ).wait()

    @override
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        peer_bytes = tensor.nbytes * (self.world - 1)
        self._start(
            header("broadcast", [tensor], root=source),
            self._starter(torch_compat.broadcast, tensor, source),
            (peer_bytes, 0) if self.rank == source else (0, tensor.nbytes),
        ).wait()

    @override
    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        # Gloo needs even sizes. Sizes usually differ by one element at most, so padding is cheap.
        longest = max(output.numel() for output in outputs)
        padded = tensor.new_empty(longest)
        padded[: tensor.numel()] = tensor.reshape(-1)
        table = tensor.new_empty(self.world, longest)

        def copy_rows() -> None:
            for row, output in zip(table, outputs, strict=True):
                output.copy_(row[: output.numel()].view(output.shape))

        def gather() -> list[Any]:
            flat = table.view(-1)
            return [torch_compat.all_gather_even(self._gloo, flat, padded)] if longest else []

        self._start(
            header("all_gather", self._with_input(outputs, tensor)),
            gather,
            self._all_gather_bytes(outputs, tensor),
            copy_rows,
        ).wait()

    @override
    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        # Gloo's reduce-scatter needs even sizes and sends as much as an all-reduce. A reduce to
        # each rank sends half of that; it overwrites its input, hence the copies.
        copies = [part.clone() for part in inputs]

        def start() -> Sequence[Any]:
            reduce, sum_op = torch_compat.reduce, sum_for_avg(op)
            return [w for n, c in enumerate(copies) for w in self._starter(reduce, c, sum_op, n)()]

        def copy_result() -> None:
            output.copy_(copies[self.rank])
            self._average(output, op)

        head = header("reduce_scatter", inputs, op)
        self._start(head, start, self._reduce_scatter_bytes(inputs), copy_result).wait()

    @override
    def start_send(self, tensor: Tensor, to: int) -> Work:
        """Start to send to one rank; the handle is done when the receiver has called `recv`."""
        number, compare = self._count_message("send", to)
        convert = partial(self._failed, "send", number=number, partner=to)
        works = []
        try:
            if compare:
                head = torch.tensor(header("send", [tensor], number=number))
                works.append(self._gloo.send([head], to, _HEADER))
            if tensor.numel():
                works.append(self._process_group(tensor).send([tensor], to, _PAYLOAD))
        except RuntimeError as error:
            raise convert(error) from None
        return self._work(works, convert, (tensor.nbytes, 0))

    @override
    def recv(self, tensor: Tensor, source: int) -> None:
        number, compare = self._count_message("recv", source)
        convert = partial(self._failed, "recv", number=number, partner=source)
        works = []
        try:
            if compare:
                self._compare_message(tensor, source, number)
            if tensor.numel():
                works.append(self._process_group(tensor).recv([tensor], source, _PAYLOAD))
        except RuntimeError as error:
            raise convert(error) from None
        self._work(works, convert, (0, tensor.nbytes)).wait()

    @override
    def barrier(self) -> None:
        self._start(header("barrier"), lambda: [self._gloo.barrier()]).wait()

    def _form(self, member: GroupMember) -> Store:
        store = Store(member)
        self._connections.append(self._connect(store, "all", self.rank, self.world))
        return store

    def _connect(self, store: Store, purpose: str, rank: int, world: int) -> tuple[Any, int, int]:
        """Create a gloo process group of `world` ranks, with this process as rank `rank`."""
        limit = self.settings.operation_s
        try:
            group = torch_compat.gloo_group(store.client, purpose, rank, world, limit, store.host)
        except RuntimeError as error:
            cause = f"gloo: {torch_compat.error_reason(error)}"
            raise CollectiveError(self.name, "rendezvous", 0, (), cause) from None
        return group, rank, world

    @property
    def _gloo(self) -> Any:
        return self._connections[0][0]

    def _process_group(self, tensor: Tensor) -> Any:
        """Return torch's process group for a tensor's device."""
        return self._gloo

    def _starter(
        self, operation: Callable[..., Any], tensor: Tensor, *args: Any
    ) -> Callable[[], list[Any]]:
        """Return a function that starts torch's operation; for an empty tensor it does nothing."""
        return lambda: (
            [operation(self._process_group(tensor), tensor, *args)] if tensor.numel() else []
        )

    def _start(
        self,
        head: Header,
        start: Callable[[], Sequence[Any]],
        traffic: tuple[int, int] = (0, 0),
        after: Callable[[], None] = do_nothing,
        *,
        overlaps: bool = False,
    ) -> Work:
        """
        Start an operation of all ranks.

        Args:
            head: its header.
            start: starts torch's operations, and returns their works.
            traffic: bytes that this rank (sends, receives).
            after: called when the works are complete.
            overlaps: whether the caller may compute before it waits.

        Raises:
            CollectiveError: see `Collective`.
        """
        with self._order_lock:
            number = self._enter(head)
            head = head._replace(number=number)
            convert = partial(self._failed, head.name, number=number, head=head)
            try:
                works = start()
            except RuntimeError as error:
                raise convert(error) from None
            return self._work(works, convert, traffic, after, overlaps=overlaps)

    def _work(
        self,
        works: Sequence[Any],
        convert: ConvertError,
        traffic: tuple[int, int],
        after: Callable[[], None] = do_nothing,
        *,
        overlaps: bool = False,
    ) -> Work:
        """Return a handle for torch's works; their time counts until torch has completed them."""
        stop = self._meter.begin()
        if overlaps and works:
            self._when_done(works[-1], stop)

        def finish() -> None:
            try:
                for work in works:
                    self._wait(work)
            except RuntimeError as error:
                raise convert(error) from None
            stop()
            self._meter.end(*traffic)
            after()

        return Work(finish)

    def _wait(self, work: Any) -> None:
        """Wait for one of torch's works; raise `RuntimeError` if it failed or timed out."""
        work.wait()

    def _when_done(self, work: Any, callback: Callable[[], None]) -> None:
        """Call a function when torch's work is complete, if torch reports it."""
        torch_compat.when_done(work, callback)

    def _enter(self, head: Header) -> int:
        """Count an operation of all ranks, and compare headers if needed; return its number."""
        with self._order_lock:
            self._started += 1
            number = self._started
            self._raise_if_broken(head.name, number)
            if self._is_compared(number):
                self._compare(head._replace(number=number))
            return number

    def _is_compared(self, number: int) -> bool:
        """Return whether an operation of all ranks starts by comparing headers."""
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
        self._raise_if_broken(operation, number)
        return number, self.settings.debug or number <= COMPARED

    def _compare_message(self, tensor: Tensor, source: int, number: int) -> None:
        other_header = torch.empty(LENGTH, dtype=torch.int64)
        with self._meter.waiting():
            self._gloo.recv([other_header], source, _HEADER).wait()
        sent, expected = Header(*other_header.tolist()), header("send", [tensor], number=number)
        try:
            check_message(self.name, source, self.rank, sent, expected)
        except MismatchError:
            self._disconnect()  # the sender waits for the message to be received
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
        """Find the missing ranks, once for all pending operations; return the error to raise."""
        with self._failing:
            if self._failure is None:
                self._disconnect()  # ends waits of other ranks for this rank
                pause_s = self._heartbeat.stood_still_s()
                fields = "" if head is None else " ".join(map(str, head))
                missing = self._heartbeat.find_missing(
                    number, partner, lambda: self._is_aborted, fields
                )
                why = f"torch: {torch_compat.error_reason(error)}"
                if isinstance(error, CollectiveError):  # of a group inside this one
                    why = error.cause
                cause = f"{self.settings.deadline}; {why}"
                if pause_s:
                    pause = f"this process stood still for {pause_s:.0f} s"
                    cause = f"{pause} (stopped, or without a processor); {cause}"
                self._failure = self._header_mismatch() or (CollectiveError, missing, cause)
                if self._is_aborted:
                    self._failure = CollectiveError, (), GIVEN_UP
        return self._error(operation, number)

    def _error(self, operation: str, number: int) -> CollectiveError:
        assert self._failure is not None, "called only after a failure"
        cls, missing, cause = self._failure
        return cls(self.name, operation, number, missing, cause)

    def _header_mismatch(self) -> tuple[type[CollectiveError], tuple[int, ...], str] | None:
        """Compare the ranks' headers of the failed operation; return the failure if they differ."""
        headers = [Header(*map(int, text.split())) for text in self._heartbeat.headers]
        if len({head.number for head in headers}) > 1:
            return None  # some ranks had completed the operation that failed on others
        try:
            check_headers(self.name, self.rank, headers)
        except MismatchError as error:
            return MismatchError, error.missing, error.cause
        return None

    @property
    def _is_aborted(self) -> bool:
        """Whether the group was aborted, or the attempt abandoned."""
        return self._aborted or self.settings.abandoned.is_set()

    @override
    def _abort(self) -> None:
        self._aborted = True
        self._disconnect()

    def _disconnect(self) -> None:
        """
        Break all connections, so that pending operations of this rank and of its peers fail.

        `ProcessGroupGloo.abort` does not end them. But gloo breaks all pairs of a context when an
        operation times out, so a receive that no rank answers is started with a timeout of 1 ms.
        """
        for group, rank, world in list(self._connections):
            for peer in (other for other in range(world) if other != rank):
                with suppress(RuntimeError):
                    group.recv([torch.empty(1)], peer, _UNUSED).wait(timedelta(milliseconds=1))

    @override
    def _leave(self) -> None:
        """Close the connections; pending operations fail."""
        failed = bool(self._meter.unfinished or self._failure or self._is_aborted)
        if failed:
            self._disconnect()
        self._heartbeat.stop()
        self._failure = self._failure or (CollectiveError, (), "this rank has left the group")
        self._connections.clear()
        self._store.close(after_failure=failed)

    def _raise_if_broken(self, operation: str, number: int) -> None:
        if self._failure is None and self._is_aborted:
            self._failure = CollectiveError, (), GIVEN_UP
        if self._failure is not None:
            raise self._error(operation, number)

    def _on_beat(self) -> None:
        if self._is_aborted:
            self._disconnect()

    def _with_input(self, outputs: Sequence[Tensor], tensor: Tensor) -> list[Tensor]:
        """Return the outputs with this rank's input in its place, for the header's sizes."""
        return [*outputs[: self.rank], tensor, *outputs[self.rank + 1 :]]

    def _all_gather_bytes(self, outputs: Sequence[Tensor], tensor: Tensor) -> tuple[int, int]:
        """Return the bytes that an all-gather (sends, receives)."""
        received = sum(output.nbytes for output in outputs) - tensor.nbytes
        return tensor.nbytes * (self.world - 1), received

    def _reduce_scatter_bytes(self, inputs: Sequence[Tensor]) -> tuple[int, int]:
        """Return the bytes that a reduce-scatter (sends, receives)."""
        own_bytes = inputs[self.rank].nbytes
        return sum(part.nbytes for part in inputs) - own_bytes, own_bytes * (self.world - 1)


class NcclGroup(TorchGroup):
    """
    One rank of an NCCL group; each rank has a whole GPU.

    CUDA tensors use NCCL. Gloo is used for CPU tensors, and to compare headers.
    This class has never run on several GPUs: no such machine was available.
    """

    _nccl: Any = None

    @override
    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        if not tensor.is_cuda:
            super().all_gather(outputs, tensor)
            return
        head = header("all_gather", self._with_input(outputs, tensor))
        flat = [output.view(-1) for output in outputs]
        start = partial(torch_compat.all_gather, self._nccl, flat, tensor.reshape(-1))
        traffic = self._all_gather_bytes(outputs, tensor)
        self._start(head, lambda: [start()], traffic).wait()

    @override
    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        if not output.is_cuda:
            super().reduce_scatter(output, inputs, op)
            return
        head, flat = header("reduce_scatter", inputs, op), [part.view(-1) for part in inputs]
        flat_output, sum_op = output.view(-1), sum_for_avg(op)
        start = partial(torch_compat.reduce_scatter, self._nccl, flat_output, flat, sum_op)
        traffic, after = self._reduce_scatter_bytes(inputs), partial(self._average, output, op)
        self._start(head, lambda: [start()], traffic, after).wait()

    @override
    def _form(self, member: GroupMember) -> Store:
        store, limit_s = super()._form(member), self.settings.operation_s
        client, rank, world = store.client, self.rank, self.world
        self._nccl = torch_compat.nccl_group(client, "nccl", rank, world, limit_s)
        return store

    @override
    def _process_group(self, tensor: Tensor) -> Any:
        return self._nccl if tensor.is_cuda else self._gloo

    @override
    def _wait(self, work: Any) -> None:
        # With a timeout, `wait` blocks until the GPU is done; without, it only orders streams.
        work.wait(timedelta(seconds=self.settings.operation_s))
        if self._is_aborted or self._failure is not None:
            raise RuntimeError("the communicators were aborted")  # the values are undefined

    @override
    def _when_done(self, work: Any, callback: Callable[[], None]) -> None:
        """Do nothing: torch calls back when NCCL's operation is queued, not when it is complete."""

    @override
    def _disconnect(self) -> None:
        super()._disconnect()
        if self._nccl is not None:
            self._nccl.abort()

    @override
    def _leave(self) -> None:
        super()._leave()
        nccl, self._nccl = self._nccl, None
        if nccl is not None:  # ends at once after `_disconnect`, else after pending operations
            nccl.shutdown()
