"""
What Ray sees of the servers of embedding tables.

As in `servers/node.py`: plain, made an actor by `spawn.py`, and light where the driver names it.
There is no manager: a row's server follows from its id (`strategies/sparse/routing.py`), so there
is no map to keep, and the controller watches these servers itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distplat.actors.importing import quick_imports
from distplat.actors.messages import Address, Opened, Parcel
from distplat.actors.ray_transport import alone
from distplat.actors.transport import Transport
from distplat.platform.ledger import PushId
from distplat.platform.table_plan import PullId, TablePlan, TableSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distplat.strategies.ports import TablesCopy


class EmbeddingServer:
    """
    Keeps a part of the rows of every table. See `TableServing` for what each call does.

    Args:
        name: of the actor.
        index: its number.
        transport: its way to other actors; None: Ray's, in a process of its own.
    """

    def __init__(self, name: str, index: int, transport: Transport | None = None) -> None:
        with quick_imports():
            from distplat.actors.tables.serving import TableServing  # torch: not in the driver

        self._name = name
        self.serving = TableServing(f"embedding-server-{index}", index, transport or alone())

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def poll(self, hold_s: float) -> None:
        """Answer the controller, after so many seconds: alive."""
        time.sleep(hold_s)

    def open(
        self,
        plan: TablePlan,
        rank: int,
        memory: Address,
        saved_at: int = 0,
        saved: Sequence[list[Any]] = (),
    ) -> Opened:
        """Join an attempt."""
        return self.serving.open(plan, rank, memory, saved_at, saved)

    def begin(self, attempt: int, version: int) -> None:
        """Have the tables at this version."""
        self.serving.begin(attempt, version)

    def pull(self, pull: PullId, parcel: Parcel) -> NDArray[np.float32] | None:
        """Give rows."""
        return self.serving.pull(pull, parcel)

    def push(self, push: PushId, parcels: Sequence[Parcel], skip: bool = False) -> int:
        """Take gradients; answer when the step is made."""
        return self.serving.push(push, parcels, skip)

    def kept(self, version: int, limit_s: float) -> TablesCopy:
        """Give what was kept of a version."""
        return self.serving.kept(version, limit_s)

    def sizes(self) -> list[tuple[TableSpec, int]]:
        """Give the tables, and how many rows of each are here."""
        return self.serving.sizes()

    def part(self, table: int, first: int, count: int) -> bytes:
        """Give some rows as a file."""
        return self.serving.part(table, first, count)
