"""The port `Tables`: control by actor calls, ids and rows through this worker's memory."""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplat.actors.memory.memfd import Segment
from distplat.actors.messages import Opened, Parcel, WorkOrder
from distplat.actors.retrying_calls import Call, PendingCall
from distplat.actors.transport import Transport
from distplat.platform.errors import InfrastructureError
from distplat.platform.ledger import PushId
from distplat.platform.table_plan import PullId, TablePlan, TableSpec, plan_of
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.ports import TablesCopy
from distplat.strategies.sparse.routing import Routed
from distplat.strategies.sparse.table import RowGradients
from distplat.strategies.training.client import fetch_copies

logger = logging.getLogger(__name__)

_ANSWER_GRACE_S = 10.0
"""A server times out by itself and says who is missing; only a frozen one needs ours on top."""
_SMALLEST = 1 << 12


class _Memory:
    """A segment that servers of this node map; another, larger one where it gets too small."""

    def __init__(self, node: str, dtype: str) -> None:
        self._node, self._dtype = node, dtype
        self._segment = Segment.create(self._node, _SMALLEST, dtype)

    @property
    def address(self) -> Any:
        """Where servers find it."""
        return self._segment.address

    def room(self, elements: int, after: int = 0) -> tuple[Any, int]:
        """
        Give an array of so many elements, and where it begins.

        Args:
            elements: how many.
            after: elements at the start that are in use; who has an array of them keeps it.
        """
        if after + elements > self._segment.address.elements:
            self._segment.seal()
            size = (after + elements) * 5 // 4
            self._segment, after = Segment.create(self._node, size, self._dtype), 0
        return self._segment.tensor.numpy()[after : after + elements], after

    def close(self) -> None:
        """Let nobody map it any more."""
        self._segment.seal()


class RemoteTables:
    """
    The servers of embedding tables, seen by one worker.

    Args:
        transport: the worker's.
        order: the worker's orders, with the servers' handles.
        every: steps between two checkpoints; 0: there are none.
        abandoned: once set, waits come to their end.
    """

    def __init__(
        self, transport: Transport, order: WorkOrder, every: int, abandoned: threading.Event
    ) -> None:
        self._transport, self._order = transport, order
        self._every, self._abandoned = every, abandoned
        self._servers, self._limits = order.embedding_servers, order.job.failure
        self._ids = _Memory(transport.node, "int64")
        self._values = _Memory(transport.node, "float32")

    def connect(
        self,
        tables: tuple[TableSpec, ...],
        total_steps: int,
        saved: SavedState | None = None,
    ) -> tuple[TablePlan, int]:
        """See `Tables`; servers fetch the checkpoint's files themselves."""
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
        at, files = 0, []
        if saved is not None and order.saved is not None:
            at, files = saved.step, [order.saved.files[name] for name in saved.table_files]
        self._pulled = self._kept = 0
        memory = self._ids.address
        opened: list[Opened] = self._ask(
            "connecting to tables",
            lambda k, server: partial(
                self._transport.call, server, "open", self._plan, order.rank, memory, at, files
            ),
            "start_timeout_s",
        ).answers()
        self._near = [answer.near for answer in opened]
        names = ", ".join(table.name for table in tables)
        near = [k for k, is_near in enumerate(self._near) if is_near]
        far = [k for k, is_near in enumerate(self._near) if not is_near]
        logger.info("tables %s; by shared memory: %s, in the call: %s", names, near, far)
        return self._plan, min(answer.steps for answer in opened)

    def begin(self, version: int) -> None:
        """See `Tables`."""
        attempt, call = self._plan.attempt, self._transport.call
        question = lambda k, server: partial(call, server, "begin", attempt, version)  # noqa: E731
        self._ask(f"going on after step {version}", question, "start_timeout_s").answers()

    def pull(self, table: int, ids: Routed, *, keep: bool) -> NDArray[np.float32]:
        """See `Tables`."""
        count, width = len(ids.ids), self._plan.tables[table].width
        self._ids.room(count)[0][:] = ids.ids
        flat, start = self._values.room(count * width, self._kept)
        if keep:
            self._kept = start + flat.size
        pull = PullId(self._plan.attempt, self._order.rank, self._pulled)
        self._pulled += 1
        asked = [k for k in range(len(self._servers)) if ids.cuts[k] < ids.cuts[k + 1]]

        def question(k: int, server: Any) -> Call:
            parcel = self._parcel(k, table, ids, None, (0, start))
            return partial(self._transport.call, server, "pull", pull, parcel)

        answers = self._ask(f"pull {pull.number}", question, asked=asked).answers()
        rows: NDArray[np.float32] = flat.reshape(count, width)
        for k, answer in zip(asked, answers, strict=True):
            if answer is not None:
                rows[ids.part(k)] = answer
        return rows

    def push(
        self,
        step: int,
        gradients: Sequence[tuple[Routed, RowGradients]],
        task: int | None = None,
        skip: bool = False,
    ) -> PendingCall:
        """See `Tables`."""
        self._kept = 0
        places = self._write(gradients)
        push = PushId(self._order.run, self._order.attempt, self._order.rank, step, task)

        def question(k: int, server: Any) -> Call:
            parcels = [
                self._parcel(k, given.table, routed, given.values, place)
                for (routed, given), place in zip(gradients, places, strict=True)
            ]
            return partial(self._transport.call, server, "push", push, parcels, skip)

        return self._ask(f"push {step} to tables", question)

    def copies(self, version: int) -> list[TablesCopy] | None:
        """See `Tables`."""
        call = self._transport.call

        def ask_one(k: int, limit_s: float) -> TablesCopy:
            what = f"tables after {version} steps"
            question = lambda k, server: partial(call, server, "kept", version, limit_s)  # noqa: E731
            answer: TablesCopy = self._ask(what, question, asked=[k]).answers()[0]
            return answer

        asks = [partial(ask_one, k) for k in range(len(self._servers))]
        return fetch_copies(asks, version, self._limits.step_timeout_s)

    def close(self) -> None:
        """Leave: no server maps this worker's memory from now on."""
        self._ids.close()
        self._values.close()

    def _write(self, gradients: Sequence[tuple[Routed, RowGradients]]) -> list[tuple[int, int]]:
        """Bring ids and gradients to where servers reach them; give where each table's begin."""
        ids, _ = self._ids.room(sum(len(given.ids) for _, given in gradients))
        values, _ = self._values.room(sum(given.values.size for _, given in gradients))
        places, first_id, first_value = [], 0, 0
        for _, given in gradients:
            places.append((first_id, first_value))
            stop_id, stop_value = first_id + len(given.ids), first_value + given.values.size
            ids[first_id:stop_id] = given.ids
            values[first_value:stop_value] = given.values.reshape(-1)
            first_id, first_value = stop_id, stop_value
        return places

    def _parcel(
        self,
        k: int,
        table: int,
        ids: Routed,
        values: NDArray[np.float32] | None,
        place: tuple[int, int],
    ) -> Parcel:
        """Pack server k's part of what lies in this worker's memory, at `place`."""
        part = ids.part(k)
        count = part.stop - part.start
        if not self._near[k]:
            return Parcel(table, count, ids.ids[part], None if values is None else values[part])
        first_value = place[1] + part.start * self._plan.tables[table].width
        addresses = self._ids.address, self._values.address
        return Parcel(table, count, *addresses, place[0] + part.start, first_value)

    def _ask(
        self,
        what: str,
        question: Callable[[int, Any], Call],
        setting: str = "step_timeout_s",
        asked: Sequence[int] | None = None,
    ) -> PendingCall:
        """Ask servers, by default all."""
        numbers = range(len(self._servers)) if asked is None else asked
        calls = [question(k, self._servers[k]) for k in numbers]
        names = [f"embedding-server-{k}" for k in numbers]
        limit = getattr(self._limits, setting) + _ANSWER_GRACE_S

        def look() -> None:
            if self._abandoned.is_set():
                raise InfrastructureError(f"{what}: this rank was told to give up")

        return PendingCall(self._transport, what, calls, names, limit, setting, look)
