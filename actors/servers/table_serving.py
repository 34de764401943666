"""
Implementation of a server node of embedding tables, and the transfer of ids and rows.

Workers on this node keep ids and rows in their own segments, which the server maps at the first
request that names them: rows are gathered directly into the worker's memory, and gradients are read
from there. Ids and rows of workers on other nodes are arrays in the call.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import MemoryAddress, OpenReply, RowTransfer, TablePart
from distplat.actors.servers.replication import Replication
from distplat.actors.servers.serving import Serving
from distplat.actors.transport import Transport
from distplat.platform.ledger import PullId, PushId
from distplat.platform.server_group import Role, ServerReport
from distplat.platform.shard_map import TablePlan, TableSpec
from distplat.strategies.ports import TablesCopy
from distplat.strategies.server.answers import tables_copy
from distplat.strategies.server.table_store import TableServer
from distplat.strategies.sparse.files import PartSource
from distplat.strategies.sparse.table import RowGradients


class TableServing(Serving[TableServer], PartSource):
    """
    Implementation of a server node that stores a part of every table.

    Args:
        part: the part of every table.
        transport: for calls to other actors.
    """

    def __init__(self, part: TablePart, transport: Transport) -> None:
        super().__init__(part.server, transport)
        self._server = TableServer(part.server, part.index)
        store, role = self._server.store, Role.WAITING if part.replicated else Role.ALONE
        self._replication = Replication(part.server, transport, role, store, part.limit_s)
        if part.replicated:
            store.backup_link = self._replication
        self._plan: TablePlan | None = None
        self._mapped: dict[tuple[int, str], MemorySegment] = {}  #: by rank and dtype; the newest

    @override
    def held(self) -> ServerReport:
        store = self._server.store
        return (
            self._replication.held(store.index) if store.opened else ServerReport(self._name, None)
        )

    def open(
        self,
        plan: TablePlan,
        rank: int,
        memory: MemoryAddress,
        saved_at: int = 0,
        saved: Sequence[list[Any]] = (),
    ) -> OpenReply:
        """Connect a worker for an attempt. See `TableServer.open`."""
        self._replication.state.check_serves()
        limit_s = plan.job.failure.start_timeout_s
        files = (self._transport.get(ref[0], limit_s) for ref in saved)
        steps = self._server.open(plan, saved_at, files)
        if self._plan is None or plan.attempt > self._plan.attempt:
            self._mapped = {}  # workers have new memory; unmap that of lost workers, too
        self._plan = plan
        self._server.exclusively(lambda: self._server.forget_push_reply(rank))
        return OpenReply(self._shares_memory(rank, memory), steps)

    def begin(self, attempt: int, version: int) -> None:
        """Roll the tables back to a version, if needed. See `TableServer.begin`."""
        self._replication.state.check_serves()
        self._server.begin(attempt, version)

    def pull(self, pull: PullId, transfer: RowTransfer) -> NDArray[np.float32] | None:
        """Write rows into the worker's memory; return them if it is not shared with this server."""
        self._replication.state.check_serves()
        ids, rows = self._ids(pull.rank, transfer), self._values(pull.rank, transfer)
        remote = rows is None
        if rows is None:
            assert self._plan is not None, "workers open before they pull"
            rows = np.empty((transfer.count, self._plan.tables[transfer.table].width), np.float32)
        self._server.read(pull, transfer.table, ids, rows, again=remote)
        return rows if remote else None

    def push(
        self,
        push: PushId,
        transfers: Sequence[RowTransfer],
        skip: bool = False,
        settings: tuple[float, ...] = (),
    ) -> int:
        """Receive gradients; return when the step is complete. See `TableServer.add`."""
        self._replication.state.check_serves()
        gradients = []
        for transfer in transfers:
            values = self._values(push.rank, transfer)
            assert values is not None, "a push has gradients"
            gradients.append(RowGradients(transfer.table, self._ids(push.rank, transfer), values))
        return self._server.add(push, gradients, skip, settings).version

    def kept(self, version: int, limit_s: float) -> TablesCopy:
        """Return the checkpoint copy of a version, as an object reference. See `Server.kept`."""
        copy = tables_copy(self._server, version, limit_s)
        return copy if copy.ref is None else replace(copy, ref=[self._transport.put(copy.ref)])

    @override
    def sizes(self) -> list[tuple[TableSpec, int]]:
        return self._server.sizes()

    @override
    def part(self, table: int, first: int, count: int) -> bytes:
        return self._server.part(table, first, count)

    def _shares_memory(self, rank: int, memory: MemoryAddress) -> bool:
        """Map a worker's memory; return whether that is possible."""
        if memory.node != self._transport.node:
            return False
        try:
            self._map(rank, memory)
        except OSError:
            return False
        return True

    def _ids(self, rank: int, transfer: RowTransfer) -> NDArray[np.int64]:
        if not isinstance(transfer.ids, MemoryAddress):
            return transfer.ids
        stop = transfer.first_id + transfer.count
        ids: NDArray[np.int64] = self._map(rank, transfer.ids)[transfer.first_id : stop]
        return ids

    def _values(self, rank: int, transfer: RowTransfer) -> NDArray[np.float32] | None:
        if not isinstance(transfer.values, MemoryAddress):
            return transfer.values
        assert self._plan is not None, "workers open before they pull or push"
        width = self._plan.tables[transfer.table].width
        stop = transfer.first_value + transfer.count * width
        flat = self._map(rank, transfer.values)[transfer.first_value : stop]
        values: NDArray[np.float32] = flat.reshape(transfer.count, width)
        return values

    def _map(self, rank: int, address: MemoryAddress) -> Any:
        """Return a worker's memory as an array; a worker has one segment of each dtype."""
        segment = self._mapped.get((rank, address.dtype))
        if segment is None or segment.address != address:
            segment = self._mapped[rank, address.dtype] = MemorySegment.open(address)
        return segment.tensor.numpy()
