"""
A run in memory with its attempts: N ranks as threads, servers over `LocalTransport`.

Ranks communicate through the `Fabric` of `strategies/fakes.py`; the actors are those of distplat.
To inject faults, tests subclass `Attempt` and override its connections or hooks.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dealing import make_task_scheduler
from local_servers import ELSEWHERE, Servers, TableServers
from rank_threads import on_ranks
from torch import Tensor

from distplat.actors.checkpoint_uploader import CheckpointUploader
from distplat.actors.local_actors import HERE
from distplat.actors.local_transport import fetch_arrays
from distplat.platform.checkpoints import CheckpointAssembly, Delivery
from distplat.platform.errors import Abandoned
from distplat.platform.progress import AnyReport, EvalReport, EvalSummary, ReportAggregator
from distplat.platform.resume import joined_facts, state_of
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.platform.tensor_slices import assemble_tensors, group_by_file
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
from distplat.strategies.collective import Collective
from distplat.strategies.fakes import Fabric, InMemoryRunStore
from distplat.strategies.loop.loop import LeasedLoop, Loop, Progress
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.loop.session import (
    CheckpointPorts,
    Ports,
    describe,
    join,
    make_task,
    prepare,
    resize,
    trained_model,
)
from distplat.strategies.ports import Leases, Shards, Tables
from distplat.strategies.task import Task
from distplat.strategies.worker_strategy import WorkerStrategy, make_worker_strategy


@dataclass
class Rank:
    """State of a worker's process that is kept across attempts."""

    prepared: Prepared
    strategy: WorkerStrategy[Any]
    progress: Progress = field(default_factory=Progress)


class LocalRun:
    """
    A run's processes.

    Args:
        job: names the strategy, whose `roles` define the server group.
        task: the task's class.
        timeout_s: deadline of the ports' waits.
        rewinds: see `TablePlan`.
        lease_size: tasks of a lease, if tasks are leased.
        speeds: of the servers, which define the shards' sizes; empty: equal sizes.
    """

    def __init__(
        self,
        job: Job,
        task: type[Task],
        *,
        timeout_s: float = 60.0,
        rewinds: bool = False,
        lease_size: int = 1,
        speeds: Sequence[float] = (),
    ) -> None:
        self.job, self.task, self.timeout_s = job, task, timeout_s
        self._rewinds, self._lease_size, self._speeds = rewinds, lease_size, speeds
        self.attempts = 0
        self.checkpoints: dict[int, SavedState] = {}  #: by version, as if read from disk
        self.reports: list[list[AnyReport]] = [[] for _ in range(job.scaling.world)]  #: by rank
        self.trained: list[dict[str, Tensor]] = []  #: parts of the trained model by rank
        self.run_store = InMemoryRunStore()
        self.start_over()

    def start_over(self) -> None:
        """Replace all processes by new ones, including servers."""
        if self.attempts:
            self.close()
        self.ranks = [self._new_rank() for _ in range(self.job.scaling.world)]
        first = self.ranks[0]
        self.roles = first.prepared.roles
        self.every = self.job.checkpoint.period(first.prepared.sampler.steps_per_epoch)
        patient = with_timeouts(self.job, self.timeout_s)
        self.servers = Servers(patient, self.roles, speeds=self._speeds)
        self.tables = TableServers(patient, rewinds=self._rewinds, every=self.every)
        self.task_scheduler = make_task_scheduler(self.job, self.roles, self._lease_size)

    def _new_rank(self) -> Rank:
        # Not in threads: `prepare` seeds torch's generator, which all threads share.
        strategy = make_worker_strategy(self.job)
        prepared = prepare(self.job, make_task(self.job, lambda: self.task), strategy=strategy)
        describe(prepared)
        return Rank(prepared, strategy)

    def renew(self, rank: int) -> None:
        """Replace the process of a lost rank."""
        self.ranks[rank] = self._new_rank()

    def resize(self, world: int) -> None:
        """Change the number of ranks from the next attempt on; remaining ranks keep their state."""
        self.job = self.job.with_workers(world)
        new = range(len(self.ranks), world)
        self.ranks = self.ranks[:world] + [self._new_rank() for _ in new]
        self.reports += [[] for _ in range(world - len(self.reports))]

    def close(self) -> None:
        """End the servers; their state remains readable."""
        self.servers.close()
        self.tables.close()
        self.task_scheduler.close()

    def parameters(self, rank: int = 0) -> dict[str, Tensor]:
        """Copy one rank's model."""
        model = self.ranks[rank].prepared.flat.model
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Attempt:
    """
    One attempt of all ranks of a run.

    Args:
        run: the run.
        fabric: connects the ranks; None: one without faults.
        saved: checkpoint from which new ranks start.
        base: steps of the newest checkpoint.
        remote_servers: whether ranks compute on copies, as if servers were on another node.
    """

    ends: tuple[type[Exception], ...] = ()
    """Errors with which a rank may end; any other error fails the test."""

    def __init__(
        self,
        run: LocalRun,
        fabric: Fabric | None = None,
        *,
        saved: SavedState | None = None,
        base: int = 0,
        remote_servers: bool = False,
    ) -> None:
        self.run, self.number = run, run.attempts
        run.attempts += 1
        self.job, self.world = run.job, run.job.scaling.world
        self.fabric = fabric or Fabric(self.world, run.timeout_s)
        self.saved, self.base, self.node = saved, base, ELSEWHERE if remote_servers else HERE
        self.starts: list[int] = []  #: first step of each rank that started to train
        self.errors: dict[int, Exception] = {}  #: by rank that ended early
        self.ended = [threading.Event() for _ in range(self.world)]  #: by rank
        # With leased tasks only rank 0 delivers parts: other ranks may join and leave.
        delivering_ranks = 1 if run.roles.consistency.dynamic_tasks else self.world
        self.collector = CheckpointCollector(self.job, run.checkpoints, delivering_ranks)

    def make(self) -> bool:
        """Train until all ranks have ended; return whether all have completed the run."""
        try:
            # Unexpected errors of a rank are raised here: end the waits of the other ranks.
            failed = partial(Attempt.give_up, self)
            trained = on_ranks(self.world, self._body, meanwhile=self.meanwhile, failed=failed)
        except BaseException:
            self.run.close()
            raise
        if not self.errors:
            self.run.trained = trained
        self.run.servers.end_attempt()
        return not self.errors

    def _body(self, rank: int) -> dict[str, Tensor]:
        mine = self.run.ranks[rank]
        if self.number:
            resize(mine.prepared, self.job, mine.strategy)
        uploader = self.collector.uploader(rank, self.run.timeout_s)
        try:
            loop = self.join(rank, CheckpointPorts(self.saved, self.base, partial(take, uploader)))
            self.starts.append(loop.start)
            if loop.run() is StopOrder.RESIZE:
                raise Abandoned("told to stop")
            trained = trained_model(mine.prepared, mine.strategy, rank)
        except self.ends as error:
            self.errors[rank] = error
            self.stopped(rank)
            return {}
        finally:
            self.ended[rank].set()
        uploader.flush()
        return {name: tensor.clone() for name, tensor in trained.items()}

    def join(self, rank: int, checkpoints: CheckpointPorts) -> Loop | LeasedLoop:
        """Connect a rank."""
        mine = self.run.ranks[rank]
        dynamic_tasks = self.run.roles.consistency.dynamic_tasks
        return join(
            mine.prepared,
            mine.strategy,
            rank,
            Ports(
                collective=self.collective(rank),
                shards=self.shards(rank),
                tables=self.tables(rank) if self.job.embeddings is not None else None,
                leases=self.leases(rank) if dynamic_tasks else None,
                peers=partial(self.fabric.collective, rank),
                run_store=self.run.run_store,
            ),
            report=partial(self.report, rank),
            progress=mine.progress,
            checkpoints=checkpoints,
            stop=partial(self.before, rank),
        )

    def give_up(self) -> None:
        """End all waits, as the controller does when a rank is lost."""
        self.fabric.abort()
        self.run.servers.renew(self.number + 1)

    def collective(self, rank: int) -> Collective:
        """Return a rank's collective group."""
        return self.fabric.collective(rank)

    def shards(self, rank: int) -> Shards:
        """Return a rank's client of the parameter servers."""
        return self.run.servers.shards(
            rank,
            self.run.ranks[rank].prepared.total_steps,
            attempt=self.number,
            every=self.run.every,
            node=self.node,
            job=self.run.ranks[rank].prepared.job,
        )

    def tables(self, rank: int) -> Tables:
        """Return a rank's client of the servers of embedding tables."""
        job = self.run.ranks[rank].prepared.job
        return self.run.tables.tables(rank, attempt=self.number, job=job, saved=self.saved)

    def leases(self, rank: int) -> Leases:
        """Return a rank's client of the task scheduler."""
        return self.run.task_scheduler.leases(rank, attempt=self.number)

    def before(self, rank: int, step: int) -> StopOrder:
        """Hook before a rank's step; returns the rank's stop order."""
        return StopOrder.NONE

    def report(self, rank: int, report: AnyReport) -> None:
        """Record a rank's report."""
        self.run.reports[rank].append(report)

    def stopped(self, rank: int) -> None:
        """Hook after a rank has ended early, in the rank's thread."""

    def meanwhile(self) -> None:
        """Hook in the test's thread, while the ranks train."""


def train(
    job: Job,
    task: type[Task],
    *,
    before: Callable[[int, Prepared], None] = lambda rank, prepared: None,
    timeout_s: float = 60.0,
    saved: SavedState | None = None,
    lease_size: int = 1,
    speeds: Sequence[float] = (),
    remote_servers: bool = False,
) -> LocalRun:
    """
    Train `job.scaling.world` ranks to the end, in one attempt.

    Args:
        job: see `LocalRun`.
        task: see `LocalRun`.
        before: called for each rank before it joins, to inject a fault.
        timeout_s: see `LocalRun`.
        saved: the checkpoint to start from.
        lease_size: see `LocalRun`.
        speeds: see `LocalRun`.
        remote_servers: see `Attempt`.
    """
    run = LocalRun(job, task, timeout_s=timeout_s, lease_size=lease_size, speeds=speeds)
    for number, rank in enumerate(run.ranks):
        before(number, rank.prepared)
    Attempt(run, saved=saved, remote_servers=remote_servers).make()
    run.close()
    return run


def evaluations(run: LocalRun) -> list[EvalSummary]:
    """
    Aggregate the ranks' evaluation reports as the controller does.

    Under `ps-async` a rank may compute both parts of the last evaluation, and another rank a part
    of an earlier one: the ranks' reports are not in the order of the evaluations.

    Returns:
        Ascending by step.
    """
    aggregators: dict[int, ReportAggregator] = {}  #: by step
    summaries = []
    for reports in run.reports:
        for report in reports:
            if isinstance(report, EvalReport):
                new = ReportAggregator(len(run.reports))
                aggregator = aggregators.setdefault(report.step, new)
                summaries += [s for s in aggregator.add(report) if isinstance(s, EvalSummary)]
    return sorted(summaries, key=lambda summary: summary.step)


def with_timeouts(job: Job, limit_s: float) -> Job:
    """Return a copy of the job whose servers wait up to `limit_s`."""
    limits = {"start_timeout_s": limit_s, "step_timeout_s": limit_s}
    return job.model_copy(update={"failure": job.failure.model_copy(update=limits)})


class CheckpointCollector:
    """
    Assembles checkpoints from the ranks' parts.

    Args:
        job: the run's job.
        found: receives complete checkpoints, by version.
        givers: number of ranks that deliver parts.
    """

    def __init__(self, job: Job, found: dict[int, SavedState], delivering_ranks: int) -> None:
        self._job, self._found = job, found
        self._collecting = CheckpointAssembly(delivering_ranks)
        self._lock = threading.Lock()

    def uploader(self, rank: int, timeout_s: float) -> CheckpointUploader:
        """Create the uploader of a rank's parts."""
        copied = lambda arrays: [array.copy() for array in arrays]  # noqa: E731
        return CheckpointUploader(rank, 0, copied, self._deliver, timeout_s)

    def _deliver(self, delivery: Delivery) -> None:
        with self._lock:
            parts = self._collecting.add(delivery)
        if parts:
            self._found[delivery.version] = saved_state_of(self._job, delivery.version, parts)


def take(
    uploader: CheckpointUploader, version: int, part: CheckpointPart, facts: Mapping[str, Any]
) -> None:
    """Upload a part and wait: steps in memory are faster than uploads."""
    uploader.take(version, part, facts)
    if not part.may_skip:
        uploader.flush()


def saved_state_of(job: Job, version: int, parts: Sequence[Delivery]) -> SavedState:
    """Assemble a checkpoint's parts, without a disk."""
    pairs = [
        (fetch_arrays(ref), entries)
        for part in parts
        for ref, entries in zip(part.refs, part.entries, strict=True)
    ]
    # As on disk, these files always exist.
    files = {"model": {}, "optimizer": {}, **group_by_file(assemble_tensors(pairs))}
    facts = joined_facts([part.facts for part in parts])
    state = {**state_of(job, "run", facts), "step": version}
    return SavedState(state, lambda name: files[name])
