"""A whole training run in memory: N ranks as threads, the ports from `strategies/fakes.py`."""

from collections.abc import Callable
from dataclasses import dataclass

from rank_threads import on_ranks
from torch import Tensor

from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.fakes import (
    Fabric,
    InMemoryShards,
    InMemoryTables,
    ServerGroup,
    TableGroup,
)
from distplat.strategies.task import Task
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.session import Prepared, join, prepare


@dataclass
class Run:
    """What the ranks of a run have at its end."""

    ranks: list[Prepared]
    reports: list[list[StepReport | EvalReport]]
    """By rank."""
    progress: list[Progress]
    """By rank."""
    group: ServerGroup
    """With the shards' logs, where the strategy has servers."""
    tables: TableGroup
    """The embedding tables, where the job has some."""

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
) -> Run:
    """
    Train `job.scaling.world` ranks to the end.

    Args:
        job: names the strategy; a server group is made as its `roles` ask.
        task: the task's class.
        before: called for each rank between `prepare` and `join`, to spoil something.
        timeout_s: deadline of the ports' waits.
    """
    world = job.scaling.world
    # One after another: torch's generator, which `prepare` seeds, is shared by all threads.
    ranks = [prepare(job, task(**job.task_args)) for _ in range(world)]
    for rank, prepared in enumerate(ranks):
        before(rank, prepared)
    roles = make_strategy(job).roles(job)
    steps, servers = ranks[0].total_steps, max(1, roles.servers)
    plan = ShardPlan(job, "run", 0, world, steps, servers, roles.consistency)
    group = ServerGroup(plan, timeout_s)
    fabric = Fabric(world, timeout_s)
    tables = TableGroup(job)
    run = Run(ranks, [[] for _ in range(world)], [Progress() for _ in range(world)], group, tables)

    def body(rank: int) -> None:
        join(
            ranks[rank],
            make_strategy(job),
            rank,
            collective=fabric.collective(rank),
            shards=InMemoryShards(group, rank),
            tables=InMemoryTables(tables, rank),
            report=run.reports[rank].append,
            progress=run.progress[rank],
        ).run()

    on_ranks(world, body)
    return run
