"""
A server of embedding tables at work, and the roads by which ids and rows travel.

Workers of this node keep ids and rows in segments of their own, which the server maps when it first
hears of them: rows are gathered straight into the worker's memory, and gradients are read from
there. To and from other nodes both go as arrays in the call.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplat.actors.memory.memfd import Segment
from distplat.actors.messages import Address, Opened, Parcel
from distplat.actors.transport import Transport
from distplat.platform.ledger import PushId
from distplat.platform.table_plan import PullId, TablePlan, TableSpec
from distplat.strategies.ports import TablesCopy
from distplat.strategies.sparse.service import TableService
from distplat.strategies.sparse.table import RowGradients
from distplat.strategies.training.client import tables_copy


class TableServing:
    """
    The body of an embedding server.

    Args:
        name: for messages.
        index: its number.
        transport: its way to objects.
    """

    def __init__(self, name: str, index: int, transport: Transport) -> None:
        self._transport, self._service = transport, TableService(name, index)
        self._plan: TablePlan | None = None
        self._mapped: dict[tuple[int, str], Segment] = {}  #: by rank and dtype: the last one

    @property
    def service(self) -> TableService:
        """The tables at work."""
        return self._service

    def open(
        self,
        plan: TablePlan,
        rank: int,
        memory: Address,
        saved_at: int = 0,
        saved: Sequence[list[Any]] = (),
    ) -> Opened:
        """Join an attempt. See `TableService.open`."""
        limit_s = plan.job.failure.start_timeout_s
        files = (self._transport.get(box[0], limit_s) for box in saved)
        steps = self._service.open(plan, saved_at, files)
        if self._plan is None or plan.attempt > self._plan.attempt:
            self._mapped = {}  # every worker has new memory; of one that was lost none is held
        self._plan = plan
        return Opened(self._reaches(rank, memory), steps)

    def begin(self, attempt: int, version: int) -> None:
        """Have the tables at this version. See `TableService.begin`."""
        self._service.begin(attempt, version)

    def pull(self, pull: PullId, parcel: Parcel) -> NDArray[np.float32] | None:
        """Put rows into the worker's memory; give them, where it is out of reach."""
        ids, rows = self._ids(pull.rank, parcel), self._values(pull.rank, parcel)
        far = rows is None
        if rows is None:
            assert self._plan is not None, "workers open before they pull"
            rows = np.empty((parcel.count, self._plan.tables[parcel.table].width), np.float32)
        self._service.pull(pull, parcel.table, ids, rows, again=far)
        return rows if far else None

    def push(self, push: PushId, parcels: Sequence[Parcel], skip: bool = False) -> int:
        """Take gradients; return when the step is made. See `TableService.push`."""
        gradients = []
        for parcel in parcels:
            values = self._values(push.rank, parcel)
            assert values is not None, "a push has gradients"
            gradients.append(RowGradients(parcel.table, self._ids(push.rank, parcel), values))
        return self._service.push(push, gradients, skip)

    def kept(self, version: int, limit_s: float) -> TablesCopy:
        """Give what was kept of a version, as an object to be fetched. See `TableService.kept`."""
        copy = tables_copy(self._service, version, limit_s)
        return copy if copy.box is None else replace(copy, box=[self._transport.put(copy.box)])

    def sizes(self) -> list[tuple[TableSpec, int]]:
        """See `PartSource`."""
        return self._service.sizes()

    def part(self, table: int, first: int, count: int) -> bytes:
        """See `PartSource`."""
        return self._service.part(table, first, count)

    def _reaches(self, rank: int, memory: Address) -> bool:
        """Map a worker's memory, where that can be done."""
        if memory.node != self._transport.node:
            return False
        try:
            self._map(rank, memory)
        except OSError:
            return False
        return True

    def _ids(self, rank: int, parcel: Parcel) -> NDArray[np.int64]:
        if not isinstance(parcel.ids, Address):
            return parcel.ids
        stop = parcel.first_id + parcel.count
        ids: NDArray[np.int64] = self._map(rank, parcel.ids)[parcel.first_id : stop]
        return ids

    def _values(self, rank: int, parcel: Parcel) -> NDArray[np.float32] | None:
        if not isinstance(parcel.values, Address):
            return parcel.values
        assert self._plan is not None, "workers open before they pull or push"
        width = self._plan.tables[parcel.table].width
        stop = parcel.first_value + parcel.count * width
        flat = self._map(rank, parcel.values)[parcel.first_value : stop]
        values: NDArray[np.float32] = flat.reshape(parcel.count, width)
        return values

    def _map(self, rank: int, address: Address) -> Any:
        """Give a worker's memory as an array; a worker has one segment of each dtype."""
        held = self._mapped.get((rank, address.dtype))
        if held is None or held.address != address:
            held = self._mapped[rank, address.dtype] = Segment.open(address)
        return held.tensor.numpy()
