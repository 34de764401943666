"""Embedding tables in memory; `strategies/fakes.py` gives this out with the other fakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from distplat.platform.errors import ActorLost
from distplat.platform.ledger import PushId
from distplat.platform.spec import Job
from distplat.platform.table_plan import PullId, TablePlan, TableSpec, plan_of
from distplat.strategies.ports import Sending, TablesCopy
from distplat.strategies.sparse.routing import Routed
from distplat.strategies.sparse.service import TableService
from distplat.strategies.sparse.table import RowGradients
from distplat.strategies.training.client import fetch_copies, tables_copy
from distplat.strategies.training.restoring import SavedState


class TableGroup:
    """
    Servers in memory, shared by the ranks' `InMemoryTables`.

    Set `lost` to make the next call of every rank fail as if a server had died.

    Args:
        job: must have the field `embeddings`.
        run: its name.
        rewinds: see `TablePlan`.
        every: steps between two checkpoints; 0: there are none.
    """

    def __init__(
        self, job: Job, run: str = "run", *, rewinds: bool = False, every: int = 0
    ) -> None:
        self.every = every
        self.job, self.run, self.rewinds, self.attempt = job, run, rewinds, 0
        servers = job.embeddings.servers if job.embeddings is not None else 0
        self._services = [TableService(f"embedding-server-{i}", i) for i in range(servers)]
        self.lost = ""

    @property
    def services(self) -> list[TableService]:
        """
        Reach the servers.

        Raises:
            ActorLost: one was lost.
        """
        if self.lost:
            raise ActorLost("embedding-server-0", None, self.lost)
        return self._services


class InMemoryTables:
    """One rank's view of a `TableGroup` (see `Tables`)."""

    def __init__(self, group: TableGroup, rank: int) -> None:
        self._group, self._rank = group, rank

    def connect(
        self,
        tables: tuple[TableSpec, ...],
        total_steps: int,
        saved: SavedState | None = None,
    ) -> tuple[TablePlan, int]:
        """See `Tables`."""
        self._plan = plan_of(
            self._group.job,
            self._group.run,
            self._group.attempt,
            tables,
            total_steps,
            rewinds=self._group.rewinds,
            checkpoint_every=self._group.every,
        )
        self._pulled = 0
        at, files = (saved.step, list(saved.tables())) if saved is not None else (0, [])
        opened = [service.open(self._plan, at, files) for service in self._group.services]
        return self._plan, min(opened)

    def begin(self, version: int) -> None:
        """See `Tables`."""
        for service in self._group.services:
            service.begin(self._plan.attempt, version)

    def pull(self, table: int, ids: Routed, *, keep: bool) -> NDArray[np.float32]:
        """See `Tables`."""
        rows = np.empty((len(ids.ids), self._plan.tables[table].width), np.float32)
        pull = PullId(self._plan.attempt, self._rank, self._pulled)
        self._pulled += 1
        for server, service in enumerate(self._group.services):
            part = ids.part(server)
            service.pull(pull, table, ids.ids[part], rows[part])
        return rows

    def push(
        self,
        step: int,
        gradients: Sequence[tuple[Routed, RowGradients]],
        task: int | None = None,
        skip: bool = False,
    ) -> Sending:
        """See `Tables`; a thread for each server, for a service waits for the other ranks."""
        push = PushId(self._plan.run, self._plan.attempt, self._rank, step, task)
        services = self._group.services
        pool = ThreadPoolExecutor(len(services))
        calls: list[Callable[[], int]] = []
        for server, service in enumerate(services):
            parts = [part_of(routed, given, server) for routed, given in gradients]
            calls.append(lambda service=service, parts=parts: service.push(push, parts, skip))  # type: ignore[misc]
        pushing = _Pushing([pool.submit(call) for call in calls])
        pool.shutdown(wait=False)
        return pushing

    def copies(self, version: int) -> list[TablesCopy] | None:
        """See `Tables`."""
        asks = [partial(tables_copy, service, version) for service in self._group.services]
        return fetch_copies(asks, version, self._plan.job.failure.step_timeout_s)


class _Pushing:
    """See `Sending`."""

    def __init__(self, answers: list[Future[int]]) -> None:
        self._answers = answers

    def wait(self) -> None:
        for answer in self._answers:
            answer.result()


def part_of(routed: Routed, gradients: RowGradients, server: int) -> RowGradients:
    """Give what goes to one server: views, not copies."""
    part = routed.part(server)
    return RowGradients(gradients.table, gradients.ids[part], gradients.values[part])
