"""
A gloo backend for `ray.util.collective` whose groups are private and whose waits end.

Ray's own makes the first group the process's torch world; later groups repeat its ranks, and an
operation waits half an hour for a frozen peer. Here each group has a process group and a store of
its own, an operation ends after the group's deadline, and the error names the ranks that are
missing: every rank beats in the store twice a second, from a thread, so who stops beating is
frozen or dead, and who beats but is behind has not come. (docs/decisions/private_gloo_groups.md)
"""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import ray
import torch.distributed
from ray.experimental.internal_kv import _internal_kv_del
from ray.util.collective import types
from torch import Tensor

from distplat.actors.group import Group, find_word, leave_word
from distplat.actors.messages import rendezvous_key
from distplat.platform.errors import CollectiveError
from distplat.strategies.base import Handle

dist: Any = torch.distributed  # torch's stubs leave out most of ProcessGroupGloo

BACKEND = "DISTPLAT_GLOO"
BEAT_S = 0.5
_SILENT_S = 4 * BEAT_S
"""Who has not beaten for so long is missing."""

_OPS = {
    types.ReduceOp.SUM: dist.ReduceOp.SUM,
    types.ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
    types.ReduceOp.MIN: dist.ReduceOp.MIN,
    types.ReduceOp.MAX: dist.ReduceOp.MAX,
}


class GlooGroup(Group):
    """One rank's end of a private gloo group (see Ray's `BaseGroup` for the calls)."""

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self._number = 0  #: operations begun
        host, port = self._rendezvous()
        self._store = self._client(host, port)
        self._pulse = _Pulse(self._client(host, port), rank, lambda: self._number)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=self.settings.operation_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._address())]
        try:
            self._wait_for_all()
            self._group = dist.ProcessGroupGloo(
                dist.PrefixStore("gloo", self._store), rank, world_size, options
            )
        except RuntimeError as error:
            raise self._failed("rendezvous", error) from None

    @classmethod
    def backend(cls) -> str:
        """Name under which Ray knows this backend."""
        return BACKEND

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Whether this torch was built with gloo."""
        return bool(dist.is_gloo_available())

    def destroy_group(self) -> None:
        """Close the connections; peers in an operation fail at once."""
        self._pulse.stop()
        self._group.abort()
        if self.rank == 0:
            _internal_kv_del(rendezvous_key(self.group_name))

    def allreduce(self, tensors: list[Tensor], allreduce_options: Any) -> None:
        """Reduce in place."""
        self.start_allreduce(tensors[0], allreduce_options.reduceOp).wait()

    def start_allreduce(self, tensor: Tensor, op: types.ReduceOp) -> Handle:
        """See `Group`."""
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        return _Pending(self._start("all_reduce", lambda: self._group.allreduce([tensor], options)))

    def abort(self) -> None:
        """See `Group`."""
        self._group.abort()

    def reduce(self, tensors: list[Tensor], reduce_options: Any) -> None:
        """Reduce into the root's tensor."""
        options = dist.ReduceOptions()
        options.reduceOp, options.rootRank = _OPS[reduce_options.reduceOp], reduce_options.root_rank
        self._start("reduce", lambda: self._group.reduce(tensors, options))()

    def broadcast(self, tensors: list[Tensor], broadcast_options: Any) -> None:
        """Copy the root's tensor to all."""
        options = dist.BroadcastOptions()
        options.rootRank = broadcast_options.root_rank
        self._start("broadcast", lambda: self._group.broadcast(tensors, options))()

    def allgather(
        self, tensor_lists: list[list[Tensor]], tensors: list[Tensor], allgather_options: Any = None
    ) -> None:
        """Copy every rank's tensor to all."""
        self._start("all_gather", lambda: self._group.allgather(tensor_lists, tensors))()

    def reducescatter(
        self, tensors: list[Tensor], tensor_lists: list[list[Tensor]], reducescatter_options: Any
    ) -> None:
        """Reduce the n-th tensors of all ranks into rank n's."""
        options = dist.ReduceScatterOptions()
        options.reduceOp = _OPS[reducescatter_options.reduceOp]
        self._start(
            "reduce_scatter", lambda: self._group.reduce_scatter(tensors, tensor_lists, options)
        )()

    def send(self, tensors: list[Tensor], send_options: Any) -> None:
        """Send to one rank."""
        self._start("send", lambda: self._group.send(tensors, send_options.dst_rank, 0))()

    def recv(self, tensors: list[Tensor], recv_options: Any) -> None:
        """Receive from one rank."""
        self._start("recv", lambda: self._group.recv(tensors, recv_options.src_rank, 0))()

    def barrier(self, barrier_options: Any = None) -> None:
        """Wait for all."""
        self._start("barrier", lambda: self._group.barrier())()

    def _start(self, operation: str, begin: Callable[[], Any]) -> Callable[[], None]:
        self._number += 1
        number = self._number
        try:
            work = begin()
        except RuntimeError as error:
            raise self._failed(operation, error) from None

        def finish() -> None:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failed(operation, error, number) from None

        return finish

    def _failed(
        self, operation: str, error: Exception, number: int | None = None
    ) -> CollectiveError:
        """Find out who is missing, and say it."""
        number = self._number if number is None else number
        missing = self._pulse.missing(self.world_size, number)
        limit = self.settings
        seconds = limit.rendezvous_s if operation == "rendezvous" else limit.operation_s
        cause = f"deadline {seconds:g} s; gloo says: {str(error).splitlines()[0]}"
        return CollectiveError(self.group_name, operation, number, missing, cause)

    def _rendezvous(self) -> tuple[str, int]:
        """Rank 0 opens the store and leaves its address with Ray; the others look it up."""
        if self.rank == 0:
            self._listener = socket.create_server((self._address(), 0))
            host, port = self._listener.getsockname()[:2]
            self._server = dist.TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=self._listener.detach(),
            )
            leave_word(self.group_name, f"{host} {port}".encode())
            return host, port
        host, port = find_word(self.group_name, 0, self.settings).decode().split()
        return host, int(port)

    def _wait_for_all(self) -> None:
        """Be patient here: gloo itself would give the others one operation's time to come."""
        self._store.set(f"here/{self.rank}", "")
        everybody = [f"here/{rank}" for rank in range(self.world_size)]
        self._store.wait(everybody, timedelta(seconds=self.settings.rendezvous_s))

    def _client(self, host: str, port: int) -> Any:
        timeout = timedelta(seconds=self.settings.rendezvous_s)
        return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)

    @staticmethod
    def _address() -> str:
        """Address to listen on: loopback where the cluster is one node, else this node's own."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        return "127.0.0.1" if len(alive) == 1 else str(ray.util.get_node_ip_address())


class _Pending:
    def __init__(self, finish: Callable[[], None]) -> None:
        self.wait = finish


class _Pulse:
    """Tells the others that this rank lives and how far it is; tells us the same of them."""

    def __init__(self, store: Any, rank: int, number: Callable[[], int]) -> None:
        self._store, self._rank, self._number = store, rank, number
        self._lock = threading.Lock()  # one store connection answers one question at a time
        self._stopped = threading.Event()
        self._count = 0
        self._beat()
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def stop(self) -> None:
        """Beat no more."""
        self._stopped.set()

    def missing(self, world: int, number: int) -> tuple[int, ...]:
        """
        Give the ranks that are silent; if all beat, those that have not begun operation `number`.

        Takes about two seconds. Rank 0 keeps the store: if that does not answer, rank 0 is missing.
        """
        found: list[tuple[int, ...]] = []
        # In a thread of its own: a frozen rank 0 leaves a question to its store open for ever.
        look = threading.Thread(
            target=lambda: found.append(self._compare(world, number)), daemon=True
        )
        look.start()
        look.join(2 * _SILENT_S)
        return found[0] if found else (0,)

    def _compare(self, world: int, number: int) -> tuple[int, ...]:
        try:
            before = self._read(world)
            time.sleep(_SILENT_S)
            after = self._read(world)
        except (RuntimeError, ValueError):
            return (0,)
        others = [rank for rank in range(world) if rank != self._rank]
        silent = [rank for rank in others if before[rank] == after[rank]]
        behind = [rank for rank in others if after[rank][1] < number]
        return tuple(silent or behind)

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_S):
            try:
                self._beat()
            except RuntimeError:
                return  # rank 0 has closed the store: the group is over

    def _beat(self) -> None:
        self._count += 1
        with self._lock:
            self._store.set(f"pulse/{self._rank}", f"{self._count} {self._number()}")

    def _read(self, world: int) -> Sequence[tuple[int, int]]:
        """Give (beats, operations begun) of each rank; (0, 0) for one that never came."""
        read = []
        with self._lock:
            for rank in range(world):
                key = f"pulse/{rank}"
                value = self._store.get(key).decode() if self._store.check([key]) else "0 0"
                beats, number = value.split()
                read.append((int(beats), int(number)))
        return read
