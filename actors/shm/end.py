"""One rank's end of a group in shared memory, without Ray: operations, their order and accounts."""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from distplat.actors.memory.memfd import Segment
from distplat.actors.shm.arena import Arena
from distplat.actors.shm.header import STAGED, Header
from distplat.actors.shm.host import give_back, on_host
from distplat.actors.shm.mail import Mail
from distplat.actors.shm.ops import Bytes, Operations
from distplat.actors.shm.order import Order, Pending
from distplat.actors.shm.signals import Signals
from distplat.actors.shm.vectors import SharedVectors, create_vector
from distplat.actors.shm.watch import TOLD, Activity, Watch
from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import ReduceOp, Traffic

_CLOSE_S = 2.0


class End:
    """
    One rank of a group. The calls are those of `Collective`, with tensors on the CPU or on CUDA.

    After an operation failed, all later ones fail, and the other ranks are told.

    Args:
        group: its name.
        arena: what the ranks share.
        operation_s: deadline of each operation.
        abandoned: once set, whoever waits gives up.
        traffic: grows with every operation.
    """

    def __init__(
        self,
        group: str,
        arena: Arena,
        operation_s: float,
        abandoned: threading.Event,
        traffic: Traffic,
    ) -> None:
        self._arena, self._traffic = arena, traffic
        self._watch = Watch(group, arena, operation_s, abandoned)
        self._signals = Signals(group, arena, self._watch)
        self._vectors = SharedVectors()
        self._operations = Operations(self._signals, arena, self._vectors)
        self._mail = Mail(group, arena, self._watch)
        self._order = Order(f"shm {group}")
        self._number = 0
        self._counting = threading.Lock()

    def enter(self) -> None:
        """Say that this rank is here; nothing else may be called before nobody is absent."""
        self._arena.enter()
        self._signals.post()

    def absent(self) -> list[int]:
        """Give the ranks that have not entered."""
        return [rank for rank, word in enumerate(self._arena.words) if not word.wait(1, 0.0)]

    def begin(self) -> None:
        """Everybody has entered: take hold of their processes, and let nobody else in."""
        self._arena.segment.seal()
        self._watch.observe()

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self._order.now(partial(self._perform, "barrier", None, self._operations.barrier))

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> None:
        """Combine in place."""
        self._order.now(partial(self._all_reduce, tensor, op))

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp) -> Pending:
        """Begin to combine in place; any number may be under way."""
        if tensor.is_cuda:  # the group's thread does not know what stream fills it
            torch.cuda.current_stream(tensor.device).synchronize()
        return self._order.later(partial(self._all_reduce, tensor, op))

    def _all_reduce(self, tensor: Tensor, op: ReduceOp) -> None:
        flat = on_host(tensor)
        place = self._vectors.locate(flat)
        work = partial(self._operations.all_reduce, flat, op, shared=place != STAGED)
        self._perform("all_reduce", flat, work, op=op, place=place)
        give_back(flat, tensor)

    def reduce(self, tensor: Tensor, op: ReduceOp, root: int) -> None:
        """Combine into the root's tensor."""
        flat = on_host(tensor)
        place = self._vectors.locate(flat)
        work = partial(self._operations.reduce, flat, op, root, shared=place != STAGED)
        self._order.now(partial(self._perform, "reduce", flat, work, op=op, root=root, place=place))
        give_back(flat, tensor)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Copy the root's tensor to all."""
        flat = on_host(tensor)
        place = self._vectors.locate(flat)
        work = partial(self._operations.broadcast, flat, root, shared=place != STAGED)
        self._order.now(partial(self._perform, "broadcast", flat, work, root=root, place=place))
        give_back(flat, tensor)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """Copy every rank's tensor to all; sizes may be uneven."""
        flat, parts = on_host(tensor), [on_host(output) for output in outputs]
        self._check_parts(parts, flat)
        place, digest = self._vectors.locate_all(parts)
        work = partial(self._operations.all_gather, parts, flat, shared=place != STAGED)
        self._order.now(
            partial(self._perform, "all_gather", flat, work, place=place, digest=digest)
        )
        for part, output in zip(parts, outputs, strict=True):
            give_back(part, output)

    def reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp) -> None:
        """Combine everybody's r-th input into the output of rank r; sizes may be uneven."""
        flat, parts = on_host(output), [on_host(part) for part in inputs]
        self._check_parts(parts, flat)
        place, digest = self._vectors.locate_all(parts)
        work = partial(self._operations.reduce_scatter, flat, parts, op, shared=place != STAGED)
        self._order.now(
            partial(self._perform, "reduce_scatter", flat, work, op=op, place=place, digest=digest)
        )
        give_back(flat, output)

    def share(self, like: Tensor) -> Tensor:
        """Give a vector of zeros like `like` that the other ranks have mapped, too."""
        if like.device.type != "cpu":
            return torch.zeros_like(like)
        segment, tensor = create_vector(like)
        try:
            self._order.now(partial(self._share, segment, tensor))
        finally:
            segment.seal()
        return tensor

    def _share(self, segment: Segment, tensor: Tensor) -> None:
        def exchange() -> Bytes:
            self._arena.offer(segment.address.fd)
            self._operations.in_step(lambda: self._vectors.add(segment, self._arena.offers()))
            return 0, 0

        self._perform("share", tensor.view(-1), exchange)

    def send(self, tensor: Tensor, to: int) -> None:
        """Hand a tensor to rank `to`; waits for it only if two are untaken."""
        flat = on_host(tensor)
        activity = self._message(partial(self._mail.send, flat, to))
        self._account(activity, flat.nbytes, 0)

    def recv(self, tensor: Tensor, source: int) -> None:
        """Fill a tensor with the next one of rank `source`."""
        flat = on_host(tensor)
        activity = self._message(partial(self._mail.receive, flat, source))
        self._account(activity, 0, flat.nbytes)
        give_back(flat, tensor)

    def abort(self) -> None:
        """Make whoever waits in this rank's operations fail soon; from any thread."""
        self._watch.give_up(TOLD)

    def close(self) -> None:
        """Leave the group once what it sent is taken; who waits for this rank fails soon."""
        self._mail.drain()
        self._watch.give_up("this rank has left the group")
        self._arena.leave()
        self._arena.segment.seal()
        self._order.close(_CLOSE_S)
        self._mail.close()
        self._watch.close()

    def _perform(
        self,
        operation: str,
        flat: Tensor | None,
        work: Callable[[], Bytes],
        *,
        op: ReduceOp = ReduceOp.SUM,
        root: int = 0,
        place: int = STAGED,
        digest: int = 0,
    ) -> None:
        """Run one operation, in its turn."""
        activity = Activity(operation, self._number)
        self._watch.check(activity)
        self._number += 1
        dtype, elements = (torch.uint8, 0) if flat is None else (flat.dtype, flat.numel())
        if digest:  # ranks' parts may be uneven; the digest speaks for their sizes
            elements = 0
        number = activity.number
        self._signals.begin(
            Header(number, operation, dtype, op, elements, root, place, digest), activity
        )
        try:
            sent, received = work()
        except BaseException as error:
            self._break(error, activity)
            raise
        self._account(activity, sent, received)

    def _message(self, work: Callable[[], Activity]) -> Activity:
        try:
            return work()
        except BaseException as error:
            self._break(error, None)
            raise

    def _break(self, error: BaseException, activity: Activity | None) -> None:
        """Let nobody wait for this rank: it is out of step."""
        missing = error.missing if isinstance(error, CollectiveError) else ()
        what = f"{activity.name} #{activity.number}" if activity else "a message"
        self._watch.give_up(f"the group failed before, in {what}: {error}", missing)
        self._arena.leave()

    def _account(self, activity: Activity, sent: int, received: int) -> None:
        seconds = time.perf_counter() - activity.began
        with self._counting:  # messages and collectives may end at the same time
            self._traffic.sent_bytes += sent
            self._traffic.received_bytes += received
            self._traffic.waiting_s += activity.waited
            self._traffic.working_s += seconds - activity.waited

    def _check_parts(self, parts: Sequence[Tensor], own: Tensor) -> None:
        world, rank = self._arena.layout.world, self._arena.rank
        if len(parts) != world or parts[rank].numel() != own.numel():
            sizes = ", ".join(str(part.numel()) for part in parts)
            raise ValueError(
                f"rank {rank} of {world} gave a tensor of {own.numel()} elements "
                f"with parts of {sizes}: one part per rank is needed, the own one of equal size"
            )
        if any(part.dtype != own.dtype for part in parts):
            raise ValueError(f"all parts must be {own.dtype}, like the rank's own tensor")
