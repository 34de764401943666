"""
The actors of one run and their orders: all made at the start, the lost replaced later, all ended.

It decides nothing: what is to be done after a failure comes as a `Restart` from `platform/job.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from distplat.actors.messages import SavedHandle, WorkOrder
from distplat.actors.ray_transport import RayTransport
from distplat.actors.retrying_calls import Orders
from distplat.actors.spares import Spares
from distplat.actors.spawn import (
    actor_name,
    room,
    spawn,
    spawn_manager,
    spawn_scheduler,
    spawn_server,
    spawn_spare,
    spawn_worker,
)
from distplat.actors.stopping import call_all
from distplat.actors.task_loading import TrainFunction
from distplat.platform.checkpoints import StoredCheckpoint
from distplat.platform.errors import DistplatError, FencedError, StorageError
from distplat.platform.recovery import Policy, Restart
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.platform.tensor_file import decode
from distplat.strategies.catalog import LoadedStrategyFile
from distplat.strategies.strategy_spec import Roles
from distplat.strategies.task import Task


@dataclass(frozen=True)
class Launch:
    """What a run starts from."""

    job: Job
    run: str
    roles: Roles
    policy: Policy
    task: type[Task] | TrainFunction | None
    """None: what `job.task` names."""
    working_dir: str
    strategy_file: LoadedStrategyFile | None
    folder: Path
    """The run directory."""
    resumed: Path | None = None
    """The checkpoint that the run begins from; None: the first step."""
    evaluated: Mapping[str, Any] | None = None
    """What evaluations had come to in that checkpoint, for `early_stop`; None: it does not say."""
    log_to_driver: bool = True
    """Whether what workers print appears in the driver, too."""
    checked: bool = False
    """The driver looks at the task's class, and says what is wrong with it."""
    saves_at_stop: bool = False
    """A run that is asked to stop takes a checkpoint first."""


class ActorGroup:
    """
    A run's actors.

    Args:
        launch: what to run; they are asked for at once and come up by themselves.
        saved: the checkpoint to begin from.

    Raises:
        SpecError: the cluster will never have what the job asks for.
    """

    def __init__(self, launch: Launch, saved: StoredCheckpoint | None) -> None:
        self._task: str | bytes = launch.job.task or ""
        if launch.task is not None:
            self._task = ray.cloudpickle.dumps(launch.task)
        # The controller gets this object, and is not to import the user's code.
        self.launch, self._attempt = replace(launch, task=None), 0
        self.job = launch.job  #: what is run, with the number of workers that there are
        self._made_for = launch.job  #: the same when servers and scheduler were made
        self._manager_attempt = 0  #: for which the manager was made
        self._controller: Any = None
        self._newcomer_count = 0
        self._orders, self._node = Orders(RayTransport()), RayTransport().node
        self._ranks = launch.job.scaling.num_workers  # that were ever given
        self._nodes: dict[int, str] = {}  #: of workers by rank
        self._spares: Spares | None = None
        self._handles = spawn(launch.job, launch.roles, launch.run, 0)
        try:
            self._give_orders(0, saved, saved.step if saved is not None else 0)
        except BaseException:
            self.end()
            raise

    @property
    def roles(self) -> dict[str, Any]:
        """The actors that answer `poll`, by role."""
        actors = {f"worker-{rank}": worker for rank, worker in self._handles.workers.items()}
        if self._handles.manager is not None:
            actors["server-manager"] = self._handles.manager
        if self._handles.scheduler is not None:
            actors["task-scheduler"] = self._handles.scheduler
        if not self._handles.replicated_tables(self.job):  # else their manager looks after them
            actors |= self._handles.embedding_servers
        return actors

    @property
    def most_workers(self) -> int:
        """Workers that the servers have threads for; 0: the number does not change in a run."""
        more = room(self.launch.roles)
        return self._made_for.scaling.world + more if more else 0

    @property
    def dynamic_tasks(self) -> bool:
        """Whether tasks are leased."""
        return self.launch.roles.consistency.dynamic_tasks

    @property
    def scheduler(self) -> Any:
        """The task scheduler; None: the strategy has none."""
        return self._handles.scheduler

    @property
    def workers(self) -> dict[int, Any]:
        """The workers by rank."""
        return self._handles.workers

    @property
    def world(self) -> int:
        """Parts of a step: workers now, or at the start where tasks are leased."""
        return self.job.scaling.num_workers

    def note_node(self, rank: int, node: str) -> None:
        """Note where a worker is; empty: it does not know yet."""
        if node:
            self._nodes[rank] = node

    def keep_spares(self) -> None:
        """Keep a spare worker on each node with workers, if the job wants some; all are at work."""
        if not self.job.failure.spare_workers:
            return
        if self._spares is None:
            make = partial(spawn_spare, self.job, self.launch.run)
            self._spares = Spares(RayTransport(), make, partial(self._order, 0, -1, None, 0))
        self._spares.keep(
            self._nodes[rank] for rank in self._handles.workers if rank in self._nodes
        )

    def stop(self, attempt: int, how: StopOrder) -> None:
        """Tell all workers to stop in an attempt; the dead are passed over."""
        for rank, worker in self._handles.workers.items():
            self._orders.give(f"worker-{rank}", worker, "stop", attempt, how)

    def tell_scheduler(self, method: str, *args: Any) -> None:
        """Give the task scheduler an order."""
        self._orders.give("task-scheduler", self._handles.scheduler, method, *args)

    def look(self) -> list[tuple[str, DistplatError]]:
        """Give lost orders again; give the roles that could not carry one out, and why."""
        return self._orders.look()

    def carry_out(
        self, restart: Restart, saved: StoredCheckpoint | None = None, checkpoint_step: int = 0
    ) -> None:
        """
        End what is to be replaced, make it anew, and give everybody the next orders.

        Args:
            restart: what is to be done.
            saved: the checkpoint to begin from, where everything is made anew.
            checkpoint_step: steps of the newest checkpoint.
        """
        launch = self.launch
        self._attempt = restart.attempt
        if restart.world is not None:
            self.job = self.job.with_workers(restart.world)
        if restart.restarts_all:
            self._handles.end()
            self._made_for = self.job
            self._handles = spawn(self.job, launch.roles, launch.run, restart.attempt)
            self._manager_attempt = restart.attempt
        else:
            for rank in restart.replace:
                ray.kill(self._handles.workers[rank])
                self._handles.workers[rank] = self._replacement(restart.attempt, rank)
            if restart.world is not None:
                self._resize(restart.world)
            self._replace_coordinators(restart)
        self._send_controller()
        self._give_orders(restart.attempt, saved, checkpoint_step)

    def _replacement(self, attempt: int, rank: int) -> Any:
        """Give a worker for a rank that was lost: the spare of its node, or a new process."""
        node = self._nodes.pop(rank, None)
        spare = self._spares.take(node) if self._spares is not None and node is not None else None
        if spare is not None:
            return spare
        placement = self._handles.renewed_placement(rank)
        return spawn_worker(self.job, self.launch.run, attempt, rank, placement)

    def _resize(self, world: int) -> None:
        """Kill the workers of ranks from `world` on, and make ready newcomers workers."""
        for rank in [one for one in self._handles.workers if one >= world]:
            self.end_worker(rank)
        for rank in range(world):
            if rank not in self._handles.workers:
                self._handles.workers[rank] = self._handles.newcomers.pop(rank)

    def start_newcomer(self, rank: int, checkpoint_step: int) -> Callable[[], Any]:
        """
        Make a worker that is to join; give what has it make itself ready.

        That gives a call which ends when it is, and may be made again.

        Args:
            rank: that it is to have.
            checkpoint_step: steps of the newest checkpoint.
        """
        self._newcomer_count += 1
        name = f"{self._attempt + 1}.{self._newcomer_count}"
        worker = spawn_worker(self.job, self.launch.run, name, rank)
        self._handles.newcomers[rank] = worker
        return partial(
            worker.prepare.remote, self._order(self._attempt + 1, rank, None, checkpoint_step)
        )

    def end_newcomer(self, rank: int) -> None:
        """End a worker that was to join."""
        ray.kill(self._handles.newcomers.pop(rank))

    def _replace_coordinators(self, restart: Restart) -> None:
        launch, handles = self.launch, self._handles
        arguments = self._made_for, launch.roles, launch.run, restart.attempt
        if "server-manager" in restart.coordinators:
            ray.kill(handles.manager)  # it may only be frozen
            handles.manager = spawn_manager(*arguments, handles, adopts=True)
            self._manager_attempt = restart.attempt
        if "task-scheduler" in restart.coordinators:
            ray.kill(handles.scheduler)
            handles.scheduler = spawn_scheduler(*arguments)

    def begin(self, controller: Any) -> None:
        """Take the controller: the manager asks it for new servers."""
        self._controller = controller
        self._send_controller()

    def _send_controller(self) -> None:
        """Send the controller's handle to the server manager, which may be a new one."""
        if self._handles.manager is not None:
            manager = self._handles.manager
            self._orders.give("server-manager", manager, "begin", self._controller)

    def make_server(self, attempt: int, server: str, beside: str) -> Any:
        """
        Make a server node for the manager, and give it; asked for twice, it is the same one.

        Args:
            attempt: for which the manager was made.
            server: its name.
            beside: the node on which it should rather not be.

        Raises:
            FencedError: there is a later manager.
        """
        if attempt != self._manager_attempt:
            raise FencedError(f"{server} is for the server manager of attempt {attempt}")
        launch, handles = self.launch, self._handles
        tables = server.startswith("embedding-")
        servers = handles.embedding_servers if tables else handles.servers
        if server not in servers:
            arguments = self._made_for, launch.roles, launch.run, self._attempt
            servers[server] = spawn_server(*arguments, server, beside)
        return servers[server]

    def grow(self, count: int, checkpoint_step: int) -> list[int]:
        """
        Start workers that join, with new ranks; return the ranks.

        Args:
            count: how many.
            checkpoint_step: steps of the newest checkpoint.
        """
        launch, ranks = self.launch, [self._ranks + number for number in range(count)]
        self._ranks += count
        for rank in ranks:
            self._handles.workers[rank] = spawn_worker(launch.job, launch.run, self._attempt, rank)
        self._start_workers(
            [self._order(self._attempt, rank, None, checkpoint_step) for rank in ranks]
        )
        return ranks

    def end_worker(self, rank: int) -> None:
        """End a worker that has left."""
        ray.kill(self._handles.workers.pop(rank))

    def end(self) -> None:
        """End all actors."""
        call_all([*([self._spares.end] if self._spares is not None else []), self._handles.end])

    def _give_orders(
        self, attempt: int, saved: StoredCheckpoint | None, checkpoint_step: int
    ) -> None:
        handle = _put_checkpoint(saved) if saved is not None else None
        self._start_workers(
            [self._order(attempt, rank, handle, checkpoint_step) for rank in self._handles.workers]
        )

    def _start_workers(self, orders: list[WorkOrder]) -> None:
        for order in orders:
            worker = self._handles.workers[order.rank]
            self._orders.give(f"worker-{order.rank}", worker, "start", order)

    def _order(
        self, attempt: int, rank: int, saved: SavedHandle | None, checkpoint_step: int
    ) -> WorkOrder:
        launch = self.launch
        return WorkOrder(
            job=self.job,
            run=launch.run,
            attempt=attempt,
            rank=rank,
            task=self._task,
            search_path=launch.working_dir,
            strategy_file=launch.strategy_file,
            manager=self._handles.manager,
            scheduler=self._handles.scheduler,
            collective=launch.roles.collective,
            saved=saved,
            checkpoint_step=checkpoint_step,
            embedding_servers=tuple(self._handles.embedding_servers.values()),
            rewinds=launch.policy.survives_worker_loss,
            checked=launch.checked,
            node=self._node,
            actor_name=actor_name(self.job, f"worker-{rank}", attempt),
        )


def _put_checkpoint(saved: StoredCheckpoint) -> SavedHandle:
    """
    Put a checkpoint where all ranks reach it.

    Raises:
        StorageError: a file of it is no tensors.
    """
    files = {}
    for name, content in saved.files.items():
        try:
            tensors = decode(content)
        except ValueError as error:
            raise StorageError(f"{saved.path / name}: {error}") from None
        files[name.removesuffix(".safetensors")] = [ray.put(tensors)]
    return SavedHandle(saved.state, files)
