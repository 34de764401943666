"""
Runs in memory that lose ranks in the middle of a step, beside servers and embedding tables.

What a rank had sent before it was lost has arrived or has not, at each server for itself. The
others stop where they wait; all go on in a new attempt, with a new rank in the lost one's place.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from in_memory_run import impatient
from numpy.typing import NDArray
from table_rows import table_rows

from distplat.actors.local_actors import ELSEWHERE, HERE, Servers, TableServers
from distplat.actors.local_transport import Call, Fault
from distplat.actors.servers.shards import RemoteShards
from distplat.actors.tables.client import RemoteTables
from distplat.platform.errors import Abandoned, CollectiveError, FencedError
from distplat.platform.ledger import PushId
from distplat.platform.spec import Job
from distplat.strategies.base import Strategy
from distplat.strategies.catalog import make_strategy
from distplat.strategies.fakes import (
    Fabric,
)
from distplat.strategies.ports import Pushed, Sending
from distplat.strategies.task import Task
from distplat.strategies.training.control import StepControl
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.session import Ports, Prepared, join, prepare, resize

WAIT_S = 10.0


class Lost(Exception):
    """As if the rank's process were no more."""


@dataclass(frozen=True)
class Loss:
    """One rank is lost in a step."""

    step: int
    rank: int
    tables: int
    """So many servers of tables have had its push."""
    shards: int = -1
    """So many shards have; -1: there are none."""
    others_s: float = 0.02
    """So long the others go on."""

    @property
    def shards_follow(self) -> bool:
        """Whether the rank lives on to push to shards."""
        return self.shards >= 0


@dataclass(frozen=True)
class Resize:
    """All ranks stop before a step."""

    step: int
    world: int
    """Ranks from then on."""


@dataclass
class LossyRun:
    """What is left of a run at its end."""

    ranks: dict[int, "Rank"]
    tables: TableServers
    starts: list[int] = field(default_factory=list)
    """By attempt: the step that it began with."""

    def dense(self) -> NDArray[np.float32]:
        """Copy the parameters of rank 0."""
        vector: NDArray[np.float32] = self.ranks[0].prepared.flat.params.numpy().copy()
        return vector

    def rows(self, number: int, count: int) -> NDArray[np.float32]:
        """See `table_rows`."""
        return table_rows(self.tables, number, count)


@dataclass
class Rank:
    """What one worker keeps from attempt to attempt."""

    prepared: Prepared
    strategy: Strategy[Any]
    progress: Progress = field(default_factory=Progress)


_ENDS: dict[type, tuple[type[Exception], ...]] = {
    Loss: (Lost, Abandoned, FencedError, CollectiveError),
    Resize: (Abandoned,),
    type(None): (),
}
"""How ranks may come out of an attempt."""


class _LastPush:
    """A push after which the rank is lost, or with which."""

    def __init__(self, sent: Sending | None, *, lost: bool) -> None:
        self._sent, self._lost = sent, lost

    def wait(self) -> None:
        if self._sent is not None:
            self._sent.wait()
        if self._sent is None or self._lost:
            raise Lost


def train_lossy(job: Job, task: type[Task], events: Sequence[Loss | Resize]) -> LossyRun:
    """
    Train to the end, with one event after the other.

    Args:
        job: names the strategy; has the field `embeddings`.
        task: its class.
        events: at most one for each attempt.
    """
    first = _rank(job, task)
    servers = Servers(impatient(job, WAIT_S), first.strategy.roles(job))
    tables = TableServers(impatient(job, WAIT_S), rewinds=True)
    run = LossyRun({}, tables)
    for attempt, event in enumerate([*events, None]):
        for rank in range(job.scaling.world):
            if rank not in run.ranks:
                run.ranks[rank] = _rank(job, task)
        run.starts.append(_Attempt(job, servers, run, attempt, event).make())
        if isinstance(event, Loss):
            del run.ranks[event.rank]
        if isinstance(event, Resize):
            job = job.with_workers(event.world)
            run.ranks = {rank: one for rank, one in run.ranks.items() if rank < event.world}
    servers.close()
    tables.close()
    return run


def _rank(job: Job, task: type[Task]) -> Rank:
    strategy = make_strategy(job)
    return Rank(prepare(job, task(), strategy=strategy), strategy)


class _Attempt:
    """One attempt of all ranks, as threads."""

    def __init__(
        self, job: Job, servers: Servers, run: LossyRun, number: int, event: Loss | Resize | None
    ) -> None:
        self._job, self._servers, self._run, self._number = job, servers, run, number
        self._event = event
        self._fabric = Fabric(job.scaling.world, WAIT_S)
        self._starts: set[int] = set()
        self._errors: dict[int, BaseException] = {}

    def make(self) -> int:
        """Go on until the event, or to the end; give the step that all began with."""
        run, event = self._run, self._event
        threads = {
            rank: threading.Thread(target=self._train, args=(rank,), daemon=True)
            for rank in run.ranks
        }
        for thread in threads.values():
            thread.start()
        if isinstance(event, Loss):
            threads[event.rank].join(WAIT_S)
            time.sleep(event.others_s)
            self._abandon()
        for thread in threads.values():
            thread.join(WAIT_S)
            assert not thread.is_alive()
        expected = _ENDS[type(event)]
        wrong = [error for error in self._errors.values() if not isinstance(error, expected)]
        assert not wrong, wrong
        if isinstance(event, Loss):  # the others may have made the last step
            assert isinstance(self._errors[event.rank], Lost)
        else:
            assert len(self._errors) == (len(threads) if event is not None else 0), self._errors
        (start,) = self._starts
        return start

    def _abandon(self) -> None:
        """Have all come out who wait for the lost rank."""
        following = self._number + 1
        self._servers.renew(following)
        self._fabric.give_up()
        for service in self._run.tables.services:
            assert service._plan is not None, "all ranks opened it"
            service.open(replace(service._plan, attempt=following))

    def _train(self, rank: int) -> None:
        mine, event = self._run.ranks[rank], self._event
        loss = event if isinstance(event, Loss) and event.rank == rank else None

        def pause(step: int) -> None:
            if isinstance(event, Resize) and step == event.step:
                raise Abandoned("told to stop")

        resize(mine.prepared, self._job, mine.strategy)
        try:
            loop = join(
                mine.prepared,
                mine.strategy,
                rank,
                Ports(
                    collective=self._fabric.collective(rank),
                    shards=self._shards(rank, loss),
                    tables=self._tables(rank, loss),
                ),
                report=lambda report: None,
                progress=mine.progress,
                pause=pause,
            )
            self._starts.add(loop.start)
            loop.run()
        except BaseException as error:
            self._errors[rank] = error

    def _shards(self, rank: int, loss: Loss | None) -> RemoteShards:
        """Give the way to the servers; in the step of its loss a rank's push reaches some only."""
        steps, node = (
            self._run.ranks[rank].prepared.total_steps,
            HERE if loss is None else ELSEWHERE,
        )
        way = self._servers.shards(rank, steps, attempt=self._number, job=self._job, node=node)
        if loss is None:
            return way
        reached, push = [f"server-{number}" for number in range(loss.shards)], way.push

        def lost(call: Call) -> None:
            pushed = call.args[0] if call.method == "push" else None
            if not isinstance(pushed, PushId) or call.process != f"worker-{rank}":
                return
            here = pushed.attempt == self._number and pushed.seq == loss.step
            if here and call.actor not in reached:
                raise Lost

        def push_all(step: int, control: StepControl, task: int | None = None) -> Pushed:
            pushed = push(step, control, task)
            if step == loss.step:
                raise Lost
            return pushed

        self._servers.cluster.add_rule(lost)
        way.push = push_all  # type: ignore[method-assign]
        return way

    def _tables(self, rank: int, loss: Loss | None) -> RemoteTables:
        """Give the way to the tables; in the step of its loss a rank's push reaches some only."""
        tables = self._run.tables
        way = tables.tables(rank, attempt=self._number, job=self._job)
        if loss is None:
            return way
        names, push = [node.name for node in tables.nodes], way.push
        complete = loss.tables >= len(names)

        def lost(call: Call) -> Fault | None:
            pushed = call.args[0] if call.method == "push" else None
            if not isinstance(pushed, PushId) or call.process != f"worker-{rank}":
                return None
            here = pushed.attempt == self._number and pushed.seq == loss.step
            reached = call.actor in names[: loss.tables]
            return Fault(lose="request") if here and not reached else None

        def push_some(step: int, *args: Any) -> Any:
            sent = push(step, *args)
            if step != loss.step:
                return sent
            return _LastPush(sent if complete else None, lost=not loss.shards_follow)

        tables.cluster.add_rule(lost)
        way.push = push_some  # type: ignore[assignment,method-assign]
        return way
