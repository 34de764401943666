"""Ranks that share memory, as threads of the test: the shared-memory backend without Ray."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from rank_threads import on_ranks
from torch import Tensor

from distplat.actors.shm.arena import Arena, Layout
from distplat.actors.shm.end import End
from distplat.platform.errors import DeadlineExceeded
from distplat.strategies.collective import Collective, Handle, ReduceOp, Traffic

T = TypeVar("T")
DEADLINE_S = 10.0


class Board:
    """Where rank 0 of a group leaves its memory for the others; stands in for Ray's store."""

    def __init__(self, slot_bytes: int | None = None, operation_s: float = DEADLINE_S) -> None:
        self.slot_bytes, self.operation_s = slot_bytes, operation_s
        self._found: dict[str, Arena] = {}
        self._changed = threading.Condition()

    def arena(self, name: str, rank: int, world: int) -> Arena:
        layout = Layout(world, self.slot_bytes) if self.slot_bytes else Layout.of(world)
        with self._changed:
            if rank == 0:
                self._found[name] = Arena.create("node", layout)
                self._changed.notify_all()
                return self._found[name]
            assert self._changed.wait_for(lambda: name in self._found, DEADLINE_S)
        return Arena.open(self._found[name].segment.address, layout, rank)


class ShmCollective:
    """The port `Collective` on an `End`."""

    def __init__(self, board: Board, name: str, rank: int, world: int) -> None:
        self.rank, self.world, self.traffic = rank, world, Traffic()
        self._board, self._name = board, name
        self.abandoned = threading.Event()
        self.arena = board.arena(name, rank, world)
        self.end = End(name, self.arena, board.operation_s, self.abandoned, self.traffic)
        self.end.enter()
        deadline = time.monotonic() + DEADLINE_S
        while missing := self.end.absent():
            if time.monotonic() > deadline:
                who = tuple(str(r) for r in missing)
                raise DeadlineExceeded(name, who, DEADLINE_S, "the test")
            time.sleep(0.001)
        self.end.begin()
        self.share = self.end.share
        self.send, self.recv, self.barrier = self.end.send, self.end.recv, self.end.barrier
        self.close, self.abort = self.end.close, self.end.abort

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        self.end.all_reduce(tensor, _no_average(op))
        self._average(tensor, op)

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        pending = self.end.start_all_reduce(tensor, _no_average(op))
        return _Averaged(pending, lambda: self._average(tensor, op))

    def start_send(self, tensor: Tensor, to: int) -> Handle:
        self.end.send(tensor, to)
        return _Sent()

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        self.end.reduce_scatter(output, inputs, _no_average(op))
        self._average(output, op)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        self.end.all_gather(outputs, tensor)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        self.end.broadcast(tensor, source)

    def subgroup(self, name: str, ranks: Sequence[int]) -> Collective:
        place = list(ranks).index(self.rank)
        return ShmCollective(self._board, f"{self._name}/{name}", place, len(ranks))

    def _average(self, tensor: Tensor, op: ReduceOp) -> None:
        if op is ReduceOp.AVG:
            tensor.div_(self.world)


class _Sent:
    def wait(self) -> None:
        pass


class _Averaged:
    def __init__(self, pending: Handle, after: Callable[[], None]) -> None:
        self._pending, self._after = pending, after

    def wait(self) -> None:
        self._pending.wait()
        self._after()


def _no_average(op: ReduceOp) -> ReduceOp:
    return ReduceOp.SUM if op is ReduceOp.AVG else op


def on_shm_ranks(
    world: int,
    body: Callable[[ShmCollective], T],
    *,
    slot_bytes: int | None = None,
    operation_s: float = DEADLINE_S,
    timeout_s: float = 30.0,
) -> list[T]:
    """Call `body(group)` on every rank of a fresh group; give what they return, in rank order."""
    board = Board(slot_bytes, operation_s)
    groups: dict[int, ShmCollective] = {}  # who ends first keeps what others still read

    def run(rank: int) -> T:
        groups[rank] = ShmCollective(board, "world", rank, world)
        return body(groups[rank])

    return on_ranks(world, run, timeout_s=timeout_s)
