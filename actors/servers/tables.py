"""Implementation of the port `Tables`: actor calls, with ids and rows in the worker's memory."""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import OpenReply, RowTransfer, TableMap, WorkOrder
from distplat.actors.retrying_calls import PendingCall
from distplat.actors.servers.fan_out import ServerCalls
from distplat.actors.servers.map_watcher import Result, ServerWatch
from distplat.actors.transport import Transport
from distplat.platform.errors import ActorLost
from distplat.platform.ledger import PullId, PushId
from distplat.platform.shard_map import TablePlan, TableSpec, plan_of
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.ports import PendingPush, Tables, TablesCopy
from distplat.strategies.server.answers import fetch_copies
from distplat.strategies.sparse.routing import Routed
from distplat.strategies.sparse.table import RowGradients

logger = logging.getLogger(__name__)

_MIN_ELEMENTS = 1 << 12
_START = "start_timeout_s"


class _GrowingSegment:
    """A segment that servers on this node map; a larger segment replaces it when it is full."""

    def __init__(self, node: str, dtype: str) -> None:
        self._node, self._dtype = node, dtype
        self._segment = MemorySegment.create(self._node, _MIN_ELEMENTS, dtype)

    @property
    def address(self) -> Any:
        """Address of the current segment."""
        return self._segment.address

    def allocate(self, elements: int, after: int = 0) -> tuple[Any, int]:
        """
        Allocate an array; return it and its offset in the current segment.

        Args:
            elements: of the array.
            after: elements in use at the start of the segment; existing arrays of them stay valid.
        """
        if after + elements > self._segment.address.elements:
            self._segment.seal()
            size = (after + elements) * 5 // 4
            self._segment, after = MemorySegment.create(self._node, size, self._dtype), 0
        return self._segment.tensor.numpy()[after : after + elements], after

    def close(self) -> None:
        """Seal the segment: no process can map it any more."""
        self._segment.seal()


class _Push(PendingPush):
    """
    A push in flight. See `PendingPush`.

    Args:
        send: sends the gradients; called again after a failover.
        with_resend: runs its first argument, and its second one after each failover.
    """

    def __init__(
        self,
        send: Callable[[], PendingCall],
        with_resend: Callable[[Callable[[], None], Callable[[], None]], None],
    ) -> None:
        self._send, self._with_resend = send, with_resend
        self._calls = send()

    @override
    def wait(self) -> None:
        self._with_resend(lambda: self._calls.wait(), lambda: self._send().wait())


class RemoteTables(Tables):
    """
    A worker's client of the servers of embedding tables.

    Args:
        transport: the worker's.
        order: the worker's orders, with the servers' handles.
        every: steps between two checkpoints; 0: checkpoints are disabled.
        abandoned: once set, waits end.
    """

    def __init__(
        self, transport: Transport, order: WorkOrder, every: int, abandoned: threading.Event
    ) -> None:
        self._transport, self._order = transport, order
        self._every, self._limits = every, order.job.failure
        self._plateau = order.job.plateau
        self._watch = ServerWatch[TableMap](transport, order.rank, self._limits, abandoned)
        servers = list(order.embedding_servers)
        self._use(servers, [f"embedding-server-{k}" for k in range(len(servers))])
        self._saved: tuple[int, list[Any]] = 0, []
        self._allocate_memory()

    @override
    def connect(
        self, tables: tuple[TableSpec, ...], total_steps: int, saved: SavedState | None = None
    ) -> tuple[TablePlan, int]:
        """Servers fetch the checkpoint's files themselves."""
        order = self._order
        self._plan = plan_of(
            order.job,
            order.run,
            order.attempt,
            tables,
            total_steps,
            rewinds=order.rewinds,
            checkpoint_every=self._every,
        )
        if saved is not None and order.saved is not None:
            files = [order.saved.files[name] for name in saved.table_files]
            self._saved = saved.step, files
        self._pulled = 0
        if order.job.embeddings is not None and order.job.embeddings.replication > 1:
            self._start_watching()
        return self._plan, self._failover(self._open)

    def _use(self, servers: Sequence[Any], names: Sequence[str]) -> None:
        self._calls = ServerCalls(self._transport, self._limits, servers, names, self._watch.check)

    def _start_watching(self) -> None:
        """Get the current map of the tables' servers, and watch for newer maps."""
        manager, transport = self._order.manager, self._transport
        calls = ServerCalls(
            transport, self._limits, [manager], ["server-manager"], self._watch.check
        )
        get_map = calls.each("table_servers", 0, 0.0)
        table_map: TableMap = calls.start("map of tables", get_map, setting=_START).answers()[0]
        self._use(table_map.servers, table_map.names)
        self._watch.begin(partial(transport.call, manager, "table_servers"), table_map.version)

    def _allocate_memory(self) -> None:
        node = self._transport.node
        self._ids, self._values = _GrowingSegment(node, "int64"), _GrowingSegment(node, "float32")
        self._kept = 0

    def _open(self) -> int:
        """Join the attempt at all servers; return the lowest step count among them."""
        args = self._plan, self._order.rank, self._ids.address, *self._saved
        open_call = self._calls.each("open", *args)
        answers: list[OpenReply] = self._calls.start(
            "connecting to tables", open_call, setting=_START
        ).answers()
        self._shares_memory = [answer.shares_memory for answer in answers]
        names = ", ".join(table.name for table in self._plan.tables)
        local = [k for k, shares in enumerate(self._shares_memory) if shares]
        remote = [k for k, shares in enumerate(self._shares_memory) if not shares]
        logger.info("tables %s; by shared memory: %s, in the call: %s", names, local, remote)
        return min(answer.steps for answer in answers)

    def _failover(self, action: Callable[[], Result]) -> Result:
        """Call the servers, with failover; see `ServerWatch.with_failover`."""
        return self._watch.with_failover(action, self._reconnect)

    def _reconnect(self, newest: TableMap) -> None:
        """Connect to the servers of a newer map."""
        self._use(newest.servers, newest.names)
        # New memory: a frozen server that wakes up writes only to the old segments.
        self.close()
        self._allocate_memory()
        self._open()

    def _with_resend(self, wait: Callable[[], None], resend: Callable[[], None]) -> None:
        """Run `wait` with failover: after each failover, `resend` runs instead."""
        action = wait

        def reconnect(newest: TableMap) -> None:
            nonlocal action
            action = resend
            self._reconnect(newest)

        self._watch.with_failover(lambda: action(), reconnect)

    @override
    def begin(self, version: int) -> None:
        def begin() -> None:
            call = self._calls.each("begin", self._plan.attempt, version)
            what = f"continuing after step {version}"
            self._calls.start(what, call, setting=_START).wait()

        self._failover(begin)

    @override
    def pull(self, table: int, ids: Routed, *, keep: bool) -> NDArray[np.float32]:
        return self._failover(lambda: self._pull(table, ids, keep=keep))

    def _pull(self, table: int, ids: Routed, *, keep: bool) -> NDArray[np.float32]:
        count, width = len(ids.ids), self._plan.tables[table].width
        self._ids.allocate(count)[0][:] = ids.ids
        flat, start = self._values.allocate(count * width, self._kept)
        if keep:
            self._kept = start + flat.size
        pull = PullId(self._plan.attempt, self._order.rank, self._pulled)
        self._pulled += 1
        servers = [k for k in range(len(self._calls.servers)) if ids.cuts[k] < ids.cuts[k + 1]]

        def call(server: Any, k: int) -> Any:
            transfer = self._transfer(k, table, ids, None, (0, start))
            return self._transport.call(server, "pull", pull, transfer)

        answers = self._calls.start(f"pull {pull.number}", call, servers).answers()
        rows: NDArray[np.float32] = flat.reshape(count, width)
        for k, answer in zip(servers, answers, strict=True):
            if answer is not None:
                rows[ids.part(k)] = answer
        return rows

    @override
    def push(
        self,
        step: int,
        gradients: Sequence[tuple[Routed, RowGradients]],
        task: int | None = None,
        skip: bool = False,
    ) -> _Push:
        push = PushId(self._order.run, self._order.attempt, self._order.rank, step, task)
        control = skip, () if self._plateau is None else tuple(self._plateau.state)
        return _Push(lambda: self._push(push, gradients, control), self._with_resend)

    def _push(
        self,
        push: PushId,
        gradients: Sequence[tuple[Routed, RowGradients]],
        control: tuple[bool, tuple[float, ...]],
    ) -> PendingCall:
        self._kept = 0
        offsets = self._write(gradients)

        def call(server: Any, k: int) -> Any:
            transfers = [
                self._transfer(k, grads.table, routed, grads.values, offset)
                for (routed, grads), offset in zip(gradients, offsets, strict=True)
            ]
            return self._transport.call(server, "push", push, transfers, *control)

        return self._calls.start(f"push {push.seq} to tables", call)

    @override
    def copies(self, version: int) -> list[TablesCopy] | None:
        def fetch(k: int, limit_s: float) -> TablesCopy:
            what, check = f"tables after {version} steps", self._watch.check_attempt
            kept = self._calls.each("kept", version, limit_s)
            answer: TablesCopy = self._calls.start(what, kept, [k], check=check).answers()[0]
            return answer

        fetches = [partial(fetch, k) for k in range(len(self._calls.servers))]
        try:
            return fetch_copies(fetches, version, self._limits.step_timeout_s)
        except ActorLost:
            if not self._watch.has_backups:
                raise
            return None  # the backup may have no copy of this version

    def close(self) -> None:
        """Seal this worker's memory: no server can map it any more."""
        self._ids.close()
        self._values.close()

    def _write(self, gradients: Sequence[tuple[Routed, RowGradients]]) -> list[tuple[int, int]]:
        """Write ids and gradients to this worker's segments; return each table's two offsets."""
        ids, _ = self._ids.allocate(sum(len(grads.ids) for _, grads in gradients))
        values, _ = self._values.allocate(sum(grads.values.size for _, grads in gradients))
        offsets, first_id, first_value = [], 0, 0
        for _, grads in gradients:
            offsets.append((first_id, first_value))
            stop_id, stop_value = first_id + len(grads.ids), first_value + grads.values.size
            ids[first_id:stop_id] = grads.ids
            values[first_value:stop_value] = grads.values.reshape(-1)
            first_id, first_value = stop_id, stop_value
        return offsets

    def _transfer(
        self,
        k: int,
        table: int,
        ids: Routed,
        values: NDArray[np.float32] | None,
        offsets: tuple[int, int],
    ) -> RowTransfer:
        """Build server k's transfer: addresses from `offsets` on, or copies if it is remote."""
        part = ids.part(k)
        count = part.stop - part.start
        if not self._shares_memory[k]:
            return RowTransfer(
                table, count, ids.ids[part], None if values is None else values[part]
            )
        first_value = offsets[1] + part.start * self._plan.tables[table].width
        addresses = self._ids.address, self._values.address
        return RowTransfer(table, count, *addresses, offsets[0] + part.start, first_value)
