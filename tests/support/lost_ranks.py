"""
Runs in memory that lose ranks in the middle of a step, with parameter and embedding servers.

The last push of a lost rank reaches only some servers. Waits of the other ranks fail. A new attempt
follows, in which a new rank replaces the lost one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from call_faults import Call, Fault, add_rule
from local_run import Attempt, LocalRun
from local_servers import ELSEWHERE
from numpy.typing import NDArray
from table_rows import table_rows

from distplat.actors.servers.shards import RemoteShards
from distplat.actors.servers.tables import RemoteTables
from distplat.platform.errors import Abandoned, CollectiveError, FencedError
from distplat.platform.ledger import PushId
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.control import StepControl
from distplat.strategies.ports import PendingPush, Pushed, Shards, Tables
from distplat.strategies.task import Task


class RankDied(Exception):
    """Simulates the death of the rank's process."""


@dataclass(frozen=True)
class RankLoss:
    """One rank is lost in a step."""

    step: int
    rank: int
    tables: int
    """Number of table servers that receive the rank's last push."""
    shards: int = -1
    """Number of shards that receive the rank's last push; -1: the run has no shards."""
    others_s: float = 0.02
    """Seconds for which the other ranks continue."""

    @property
    def shards_follow(self) -> bool:
        """Whether the rank survives until its push to shards."""
        return self.shards >= 0


@dataclass(frozen=True)
class Resize:
    """All ranks stop before a step."""

    step: int
    world: int
    """Number of ranks afterwards."""


@dataclass
class LossyRun:
    """Results of a run."""

    run: LocalRun
    starts: list[int] = field(default_factory=list)
    """First step of each attempt."""

    def dense(self) -> NDArray[np.float32]:
        """Copy the parameters of rank 0."""
        vector: NDArray[np.float32] = self.run.ranks[0].prepared.flat.params.numpy().copy()
        return vector

    def rows(self, number: int, count: int) -> NDArray[np.float32]:
        """See `table_rows`."""
        return table_rows(self.run.tables, number, count)


class _LastPush:
    """A push during or after which the rank is lost."""

    def __init__(self, sent: PendingPush | None, *, lost: bool) -> None:
        self._sent, self._lost = sent, lost

    def wait(self) -> None:
        if self._sent is not None:
            self._sent.wait()
        if self._sent is None or self._lost:
            raise RankDied


def train_with_lost_ranks(
    job: Job, task: type[Task], events: Sequence[RankLoss | Resize]
) -> LossyRun:
    """
    Train to the end, with one event per attempt, and a last attempt without.

    Args:
        job: has the field `embeddings`.
        task: class of the task.
        events: one per attempt.
    """
    run = LocalRun(job, task, rewinds=True)
    lossy = LossyRun(run)
    for event in [*events, None]:
        attempt = _ATTEMPTS[type(event)](run, event)
        attempt.make()
        attempt.check()
        (start,) = {*attempt.starts}
        lossy.starts.append(start)
        if isinstance(event, RankLoss):
            run.renew(event.rank)
        if isinstance(event, Resize):
            run.resize(event.world)
    run.close()
    return lossy


class _Unfailed(Attempt):
    """All ranks complete the run."""

    def __init__(self, run: LocalRun, event: Any) -> None:
        super().__init__(run)
        self.event = event

    def check(self) -> None:
        """Assert that the ranks have ended as expected."""
        assert not self.errors


class _UntilResize(_Unfailed):
    """All ranks stop before a step."""

    event: Resize
    ends = (Abandoned,)

    def before(self, rank: int, step: int) -> StopOrder:
        if step == self.event.step:
            raise Abandoned("told to stop")
        return StopOrder.NONE

    def check(self) -> None:
        assert len(self.errors) == self.world


class _WithLoss(_Unfailed):
    """One rank is lost, and the waits of the other ranks fail."""

    event: RankLoss
    ends = (RankDied, Abandoned, FencedError, CollectiveError)

    def check(self) -> None:
        """The other ranks may have completed the last step."""
        assert isinstance(self.errors[self.event.rank], RankDied)

    def meanwhile(self) -> None:
        assert self.ended[self.event.rank].wait(self.run.timeout_s)
        time.sleep(self.event.others_s)
        self.give_up()

    def give_up(self) -> None:
        super().give_up()
        for service in self.run.tables.table_servers:
            assert service.store.plan is not None, "all ranks have opened the server"
            service.open(replace(service.store.plan, attempt=self.number + 1))

    def _is_last_push(self, rank: int, call: Call) -> bool:
        pushed = call.args[0] if call.method == "push" else None
        if not isinstance(pushed, PushId) or call.process != f"worker-{rank}":
            return False
        return (pushed.attempt, pushed.seq) == (self.number, self.event.step)

    def shards(self, rank: int) -> Shards:
        """Return a rank's client; the last push of the lost rank reaches only some servers."""
        if rank != self.event.rank:
            return super().shards(rank)
        self.node, original_node = ELSEWHERE, self.node
        client = super().shards(rank)
        self.node = original_node
        assert isinstance(client, RemoteShards)
        reached, push = [f"server-{number}" for number in range(self.event.shards)], client.push

        def lost(call: Call) -> None:
            if self._is_last_push(rank, call) and call.actor not in reached:
                raise RankDied

        def push_all(step: int, control: StepControl, task: int | None = None) -> Pushed:
            pushed = push(step, control, task)
            if step == self.event.step:
                raise RankDied
            return pushed

        add_rule(self.run.servers.cluster, lost)
        client.push = push_all  # type: ignore[method-assign]
        return client

    def tables(self, rank: int) -> Tables:
        """Return a rank's client; the last push of the lost rank reaches only some servers."""
        client = super().tables(rank)
        if rank != self.event.rank:
            return client
        assert isinstance(client, RemoteTables)
        names, push = [node.name for node in self.run.tables.nodes], client.push
        complete = self.event.tables >= len(names)

        def lost(call: Call) -> Fault | None:
            reached = call.actor in names[: self.event.tables]
            missed = self._is_last_push(rank, call) and not reached
            return Fault(lose="request") if missed else None

        def push_some(step: int, *args: Any) -> Any:
            sent = push(step, *args)
            if step != self.event.step:
                return sent
            return _LastPush(sent if complete else None, lost=not self.event.shards_follow)

        add_rule(self.run.tables.cluster, lost)
        client.push = push_some  # type: ignore[assignment,method-assign]
        return client


_ATTEMPTS: dict[type, type[_Unfailed]] = {
    RankLoss: _WithLoss,
    Resize: _UntilResize,
    type(None): _Unfailed,
}
