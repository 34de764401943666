"""
Replay an asynchronous run from its shards' logs, in one process, bit for bit.

A gradient depends on the parameters that its worker had pulled from each shard. Nothing else varies
between runs: samples and dropout are functions of seed and task. A log has the tasks of each rank,
the order of pushes, and the version of each pull:

    shard 0   ... rank 1 task 4 | rank 0 task 7 | ...      a push waits until it is the next one
                                ^
                                the pull of rank 0's next task may be of this version

Ranks are threads that run the workers' loop, one at a time, as all threads share torch's generator.
The result does not depend on the order of threads: each value has the same inputs.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.apply_log import ApplyLog
from distplat.platform.errors import StorageError
from distplat.platform.ledger import PushId
from distplat.platform.shard_map import ShardPlan, cut_shards
from distplat.platform.task_scheduler import Lease, TaskPlan
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.checkpoint_types import Holding
from distplat.strategies.loop.control import StepControl
from distplat.strategies.loop.loop import Progress
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.loop.session import Ports, join
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.ports import Leases, Pushed, Shards
from distplat.strategies.server.dense_store import DenseStore
from distplat.strategies.worker_strategy import make_worker_strategy


class ReplayLeases(Leases):
    """The tasks of one rank from the logs (see `Leases`)."""

    def __init__(self, tasks: Sequence[int]) -> None:
        self._tasks, self._next = tasks, 0

    @override
    def connect(self, plan: TaskPlan) -> None:
        """Do nothing: the logs have the tasks."""

    @override
    def next(self, alive: Callable[[], None]) -> Lease:
        number, self._next = self._next, self._next + 1
        if number == len(self._tasks):
            return Lease(number, trained=True, over=True)
        return Lease(number, range(self._tasks[number], self._tasks[number] + 1))

    @override
    def finish(self, tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()) -> None:
        """Do nothing: tasks are not leased again."""


class ReplayGroup:
    """
    The shards of a replayed run.

    Args:
        plan: plan of the run.
        logs: one log per shard.
    """

    def __init__(self, plan: ShardPlan, logs: Sequence[ApplyLog]) -> None:
        self.plan, self._logs = plan, logs
        self.tasks = tasks_by_rank(logs)  #: rank -> its tasks in order
        self._changed = threading.Condition()
        self.computing = threading.Lock()  #: held by the rank that computes
        self._flats: dict[int, FlatModel] = {}
        self._ready: dict[int, int] = {}  #: rank -> number of its computed gradients
        self._controls: dict[int, StepControl] = {}  #: rank -> control record of its last gradient
        self._wants: dict[int, dict[int, int]] = {}  #: rank -> shard -> version to pull
        self._waiting: dict[int, Callable[[], bool]] = {}  #: rank -> whether its wait is over
        self._pulled = [_pulled_by_rank(log) for log in logs]
        self._taken = [dict.fromkeys(self.tasks, 0) for _ in logs]  #: by shard: rank -> pushes
        self._positions = [0] * len(logs)
        self.shards: list[DenseStore] = []
        self.stuck = False

    def connect(self, rank: int, flat: FlatModel) -> None:
        """Register a rank; wait for all ranks, and for the parameters of its first step."""
        with self._changed:
            self._flats[rank] = flat
            if len(self._flats) == len(self.tasks):
                self._open(self._flats[0])
            self._changed.notify_all()
        self._pull_for(rank, 0)

    def submit(self, rank: int, number: int, control: StepControl) -> int:
        """Submit a gradient to be applied in log order, pull, and return the staleness."""
        self._controls[rank] = control
        self.computing.release()
        self._pull_for(rank, number + 1)
        return max(shard.staleness_of(rank) for shard in self.shards)

    def _pull_for(self, rank: int, number: int) -> None:
        """Wait until a rank has pulled the parameters of this push, and no other rank computes."""
        if number < len(self.tasks[rank]):
            versions = {index: by[rank][number] for index, by in enumerate(self._pulled)}
            self._wait(rank, number, versions, lambda: not self._wants[rank])
        else:
            self._wait(rank, number, {}, lambda: bool(self.shards))  # all ranks have connected
        self.computing.acquire()

    def finish(self, rank: int) -> None:
        """Wait for the last update, and copy the final parameters to the rank."""
        self.computing.release()
        self._wait(rank, len(self.tasks[rank]), {}, lambda: self._over)
        self.computing.acquire()
        for cut, shard in zip(self.cuts, self.shards, strict=True):
            self._flats[rank].params[cut.start : cut.stop].copy_(shard.params)

    @property
    def _over(self) -> bool:
        return all(
            position == len(log) for position, log in zip(self._positions, self._logs, strict=True)
        )

    def fail(self) -> None:
        """Wake all ranks after an exception in one of them."""
        with self._changed:
            self.stuck = True
            self._changed.notify_all()

    def _wait(self, rank: int, ready: int, wants: dict[int, int], done: Callable[[], bool]) -> None:
        with self._changed:
            # Under one lock: a shard that may apply the gradient must know the version to stop at.
            self._ready[rank], self._wants[rank] = ready, wants
            self._waiting[rank] = done
            self._advance()
            # If all ranks wait and no push can be applied, the logs are not of this job.
            all_waiting = len(self._waiting) == len(self.tasks)
            if all_waiting and not any(is_over() for is_over in self._waiting.values()):
                self.stuck = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: self.stuck or done())
            del self._waiting[rank]
            if not done():
                raise StorageError("the log of updates cannot be replayed: it is not of this job")

    def _open(self, flat: FlatModel) -> None:
        plan, tail = self.plan, flat.layout.tail_size
        boundaries = flat.layout.starts if plan.job.optimizer.whole else ()
        self.cuts = cut_shards(flat.size, plan.shards, tail=tail, boundaries=boundaries).shards
        for cut in self.cuts:
            plan = replace(self.plan, layout=flat.layout.cut(cut.start, cut.stop))
            shard = DenseStore(plan, flat.params[cut.start : cut.stop].clone())
            shard.restore(0)
            self.shards.append(shard)

    def _advance(self) -> None:
        """Do all pulls and pushes that are possible now."""
        if not self.shards or len(self._wants) < len(self.tasks):
            return  # not all ranks have connected
        while any([self._advance_shard(index) for index in range(len(self.shards))]):
            self._changed.notify_all()

    def _advance_shard(self, index: int) -> bool:
        shard, cut, log = self.shards[index], self.cuts[index], self._logs[index]
        part = slice(cut.start, cut.stop)
        progress = False
        for rank, wants in self._wants.items():
            if wants.get(index) == shard.version and self._has_pushed(rank, index):
                shard.pull(rank)
                self._flats[rank].params[part].copy_(shard.params)
                del wants[index]
                progress = True
        position = self._positions[index]
        if position < len(log) and not self._has_pushed(log[position].rank, index):
            rank, number = log[position].rank, self._taken[index][log[position].rank]
            push = PushId(self.plan.run, self.plan.attempt, rank, number, log[position].task)
            shard.push(push, self._flats[rank].grads[part], self._controls[rank])
            shard.commit(push.seq, None)
            self._taken[index][rank] += 1
            self._positions[index] += 1
            progress = True
        return progress

    def _has_pushed(self, rank: int, index: int) -> bool:
        """Return whether the shard has applied all gradients that a rank has computed."""
        return self._taken[index][rank] == self._ready.get(rank, 0)


class ReplayShards(Shards):
    """One rank's view of a `ReplayGroup` (see `Shards`)."""

    def __init__(self, group: ReplayGroup, rank: int) -> None:
        self._group, self._rank = group, rank

    @override
    def connect(
        self, flat: FlatModel, saved: SavedState | None = None, holding: Holding | None = None
    ) -> None:
        self._group.connect(self._rank, flat)

    @override
    def step_back(self, version: int) -> None:
        """Do nothing: asynchronous shards have no common version."""

    @override
    def one_memory(self) -> bool:
        """Return False: asynchronous workers compute on copies."""
        return False

    @override
    def push(self, step: int, control: StepControl, task: int | None = None) -> Pushed:
        return Pushed(staleness=self._group.submit(self._rank, step, control), total=control)

    @override
    def commit(self, step: int, norm: float) -> Pushed:
        """Do nothing: asynchronous shards apply a push without commit."""
        return Pushed()

    @override
    def refresh(self) -> None:
        """Wait for the end of the run; earlier pulls follow the logs."""
        self._group.finish(self._rank)

    @override
    def seen(self) -> NDArray[np.bool_]:
        """Return nothing: called for synchronous shards only."""
        return np.zeros(0, np.bool_)

    @override
    def settings(self) -> tuple[float, ...]:
        """Return nothing: asynchronous shards have no plateau schedule."""
        return ()

    @override
    def left_out(self) -> bool:
        """Return False: called for synchronous shards only."""
        return False

    @override
    def average(self) -> Tensor:
        """Raise: a replay compares the parameters only, and does not evaluate."""
        raise NotImplementedError("a replayed run is not evaluated")

    @override
    def copies(self, version: int) -> None:
        """Do nothing: a replay has no checkpoints."""


def replay(
    plan: ShardPlan, logs: Sequence[ApplyLog], prepare_rank: Callable[[], Prepared], threads: int
) -> nn.Module:
    """
    Replay a run.

    Args:
        plan: plan of the run.
        logs: one complete log per shard.
        prepare_rank: builds a rank's model and data, the same for all ranks.
        threads: number of torch's intra-op threads in the workers.

    Returns:
        Rank 0's final model.

    Raises:
        StorageError: the logs are not of this job.
    """
    group = ReplayGroup(plan, logs)
    ranks = {rank: prepare_rank() for rank in group.tasks}
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        torch.set_num_threads(threads)
        try:
            _run_rank(group, rank, ranks[rank])
        except BaseException as error:
            errors.append(error)
            group.fail()

    workers = [threading.Thread(target=body, args=(r,), daemon=True) for r in ranks]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return ranks[0].flat.model


def _run_rank(group: ReplayGroup, rank: int, prepared: Prepared) -> None:
    """Run the loop of one rank."""
    prepared.eval_data = None
    try:
        join(
            prepared,
            make_worker_strategy(group.plan.job),
            rank,
            Ports(shards=ReplayShards(group, rank), leases=ReplayLeases(group.tasks[rank])),
            report=lambda report: None,
            progress=Progress(),
        ).run()
    finally:
        if group.computing.locked():
            group.computing.release()


def tasks_by_rank(logs: Sequence[ApplyLog]) -> dict[int, list[int]]:
    """
    Return each rank's tasks in order; rank 0 is always included.

    Raises:
        StorageError: the logs differ: a worker was lost when only some shards had its gradient.
    """
    by_log: list[dict[int, list[int]]] = []
    for log in logs:
        tasks: dict[int, list[int]] = {0: []}
        for applied in log:
            tasks.setdefault(applied.rank, []).append(applied.task)
        by_log.append(tasks)
    if any(tasks != by_log[0] for tasks in by_log):
        raise StorageError(
            "the shards' logs have different tasks of a rank: the rank was lost between two "
            "shards, and the parameters of its last gradient are unknown"
        )
    return by_log[0]


def _pulled_by_rank(log: ApplyLog) -> dict[int, list[int]]:
    """Return, by rank and in push order, the version that each gradient was computed on."""
    versions: dict[int, list[int]] = {}
    for applied in log:
        versions.setdefault(applied.rank, []).append(applied.pulled)
    return versions
