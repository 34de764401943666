"""
A whole training run in memory: N ranks as threads, servers and their clients over `LocalTransport`.

Between ranks there is the `Fabric` of `strategies/fakes.py`.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dealing import desk_of
from rank_threads import on_ranks
from torch import Tensor

from distplat.actors.courier import Courier
from distplat.actors.local_actors import ELSEWHERE, HERE, Servers, TableServers
from distplat.actors.local_transport import opened
from distplat.platform.collecting import Collecting, Delivery
from distplat.platform.pieces import by_file, put_together
from distplat.platform.progress import AnyReport
from distplat.platform.resume import state_of
from distplat.platform.spec import Job
from distplat.strategies.base import Strategy
from distplat.strategies.catalog import make_strategy
from distplat.strategies.fakes import (
    Fabric,
    InMemoryBoard,
)
from distplat.strategies.task import Task
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.parts import Part
from distplat.strategies.training.restoring import SavedState
from distplat.strategies.training.session import (
    Around,
    Ports,
    Prepared,
    describe,
    join,
    make_task,
    prepare,
)


@dataclass
class Run:
    """What the ranks of a run have at its end."""

    ranks: list[Prepared]
    reports: list[list[AnyReport]]
    """By rank."""
    progress: list[Progress]
    """By rank."""
    trained: list[dict[str, Tensor]]
    """By rank: its part of the trained model."""
    strategies: list[Strategy[Any]]
    """By rank."""
    servers: Servers
    """What the servers have, where the strategy has some."""
    tables: TableServers
    """The embedding tables, where the job has some."""
    checkpoints: dict[int, SavedState] = field(default_factory=dict)
    """By version, as they would be read from the disk."""

    def parameters(self, rank: int = 0) -> dict[str, Tensor]:
        """Copy one rank's model."""
        model = self.ranks[rank].flat.model
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(
    job: Job,
    task: type[Task],
    *,
    before: Callable[[int, Prepared], None] = lambda rank, prepared: None,
    timeout_s: float = 10.0,
    saved: SavedState | None = None,
    most: int = 1,
    speeds: Sequence[float] = (),
    apart: bool = False,
) -> Run:
    """
    Train `job.scaling.world` ranks to the end.

    Args:
        job: names the strategy; a server group is made as its `roles` ask.
        task: the task's class.
        before: called for each rank between `prepare` and `join`, to spoil something.
        timeout_s: deadline of the ports' waits.
        saved: the checkpoint to begin from.
        most: tasks of a lease, where they are leased.
        speeds: by which the servers' shards are cut; empty: evenly.
        apart: whether ranks compute on copies, as if servers were on another node.
    """
    world = job.scaling.world
    # One after another: torch's generator, which `prepare` seeds, is shared by all threads.
    strategies = [make_strategy(job) for _ in range(world)]
    ranks = [prepare(job, make_task(job, lambda: task), strategy=one) for one in strategies]
    for rank, prepared in enumerate(ranks):
        describe(prepared, strategies[rank])
        before(rank, prepared)
    roles, steps = strategies[0].roles(job), ranks[0].total_steps
    every = job.checkpoint.period(ranks[0].sampler.steps_per_epoch)
    servers = Servers(impatient(job, timeout_s), roles, speeds=speeds)
    node = ELSEWHERE if apart else HERE
    fabric, board = Fabric(world, timeout_s), InMemoryBoard()
    tables = TableServers(impatient(job, timeout_s), every=every)
    progress = [Progress() for _ in range(world)]
    how = roles.consistency
    desk = desk_of(job, roles, most)
    run = Run(ranks, [[] for _ in range(world)], progress, [], strategies, servers, tables)
    # Where tasks are leased rank 0 alone gives parts: the others may come and go.
    keeper = Keeper(job, run.checkpoints, 1 if how.dealt else world)

    def body(rank: int) -> dict[str, Tensor]:
        courier = keeper.courier(rank, timeout_s)
        join(
            ranks[rank],
            strategies[rank],
            rank,
            Ports(
                collective=fabric.collective(rank),
                shards=servers.shards(rank, steps, every=every, node=node),
                tables=tables.tables(rank, saved=saved) if job.embeddings is not None else None,
                leases=desk.leases(rank) if how.dealt else None,
                peers=partial(fabric.collective, rank),
                board=board,
            ),
            report=run.reports[rank].append,
            progress=run.progress[rank],
            around=Around(saved, take=partial(take, courier)),
        ).run()
        courier.flush()
        return strategies[rank].trained(ranks[rank].flat)

    try:
        run.trained = on_ranks(world, body)
    finally:
        servers.close()
        tables.close()
        desk.close()
    return run


def impatient(job: Job, limit_s: float) -> Job:
    """Give a job whose servers wait no longer than that."""
    limits = {"start_timeout_s": limit_s, "step_timeout_s": limit_s}
    return job.model_copy(update={"failure": job.failure.model_copy(update=limits)})


class Keeper:
    """
    Puts checkpoints together as the parts come.

    Args:
        job: of the run.
        found: takes them, by version.
        givers: how many ranks give parts; 0: all.
    """

    def __init__(self, job: Job, found: dict[int, SavedState], givers: int = 0) -> None:
        self._job, self._found = job, found
        self._collecting = Collecting(givers or job.scaling.world)
        self._lock = threading.Lock()

    def courier(self, rank: int, timeout_s: float = 10.0) -> Courier:
        """Make what takes a rank's parts."""
        copied = lambda arrays: [array.copy() for array in arrays]  # noqa: E731
        return Courier(rank, 0, copied, self._deliver, timeout_s)

    def _deliver(self, delivery: Delivery) -> None:
        with self._lock:
            parts = self._collecting.add(delivery)
        if parts:
            self._found[delivery.version] = as_read(self._job, delivery.version, parts)


def take(courier: Courier, version: int, part: Part, facts: Mapping[str, Any]) -> None:
    """Take a part; wait for it, for steps are quick here: shards would have newer copies soon."""
    courier.take(version, part, facts)
    if not part.may_skip:
        courier.flush()


def as_read(job: Job, version: int, parts: Sequence[Delivery]) -> SavedState:
    """Put a checkpoint's parts together, without a disk."""
    pairs = [
        (opened(box), entries)
        for part in parts
        for box, entries in zip(part.boxes, part.entries, strict=True)
    ]
    files = by_file(put_together(pairs))
    state = {**state_of(job, "run", parts[0].facts), "step": version}
    return SavedState(state, lambda name: files.get(name, {}))
