"""
The actors of one run and their orders: created at the start, replaced when lost, killed at the end.

`platform/job.py` decides what to do after a failure, and describes it in a `Restart`.
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
    spare_room,
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
    """Parameters of a run."""

    job: Job
    run: str
    roles: Roles
    policy: Policy
    task: type[Task] | TrainFunction | None
    """None: imported from `job.task`."""
    working_dir: str
    strategy_file: LoadedStrategyFile | None
    folder: Path
    """The run directory."""
    resumed: Path | None = None
    """The checkpoint to resume from; None: start at the first step."""
    evaluated: Mapping[str, Any] | None = None
    """State of `early_stop` in that checkpoint; None: it has none."""
    log_to_driver: bool = True
    """Whether to print the output of workers in the driver, too."""
    checked: bool = False
    """Whether the driver checks the task's class and logs the warnings."""
    saves_at_stop: bool = False
    """Whether a stop request writes a checkpoint first."""


class ActorGroup:
    """
    All actors of a run. Creating the object spawns them, without waiting until they are up.

    Args:
        launch: parameters of the run.
        saved: the checkpoint to start from.

    Raises:
        SpecError: the cluster can never provide the resources of the job.
    """

    def __init__(self, launch: Launch, saved: StoredCheckpoint | None) -> None:
        self._task: str | bytes = launch.job.task or ""
        if launch.task is not None:
            self._task = ray.cloudpickle.dumps(launch.task)
        # This object is pickled for the controller, which must not import the user's code.
        self.launch, self._attempt = replace(launch, task=None), 0
        self.job = launch.job  #: with the current number of workers
        self._spawned_job = launch.job  #: job at the time servers and scheduler were spawned
        self._manager_attempt = 0  #: attempt for which the manager was spawned
        self._controller: Any = None
        self._newcomer_count = 0
        self._orders, self._node = Orders(RayTransport()), RayTransport().node
        self._next_rank = launch.job.scaling.num_workers  #: ranks are never reused
        self._nodes: dict[int, str] = {}  #: node of each rank's worker
        self._spares: Spares | None = None
        self._handles = spawn(launch.job, launch.roles, launch.run, 0)
        try:
            self._order_all(0, saved, saved.step if saved is not None else 0)
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
        if not self._handles.replicated_tables(self.job):  # else the manager polls them
            actors |= self._handles.embedding_servers
        return actors

    @property
    def max_workers(self) -> int:
        """Number of workers for which servers have threads; 0: a run cannot be resized."""
        spare = spare_room(self.launch.roles)
        return self._spawned_job.scaling.world + spare if spare else 0

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
        """Workers by rank."""
        return self._handles.workers

    @property
    def world(self) -> int:
        """Number of parts of a step: current workers, or initial ones if tasks are leased."""
        return self.job.scaling.num_workers

    def note_node(self, rank: int, node: str) -> None:
        """Record the node of a worker; empty: not known yet."""
        if node:
            self._nodes[rank] = node

    def keep_spares(self) -> None:
        """Keep a spare worker on each node with workers, if enabled; called while all train."""
        if not self.job.failure.spare_workers:
            return
        if self._spares is None:
            create = partial(spawn_spare, self.job, self.launch.run)
            self._spares = Spares(RayTransport(), create, partial(self._order, 0, -1, None, 0))
        self._spares.keep(
            self._nodes[rank] for rank in self._handles.workers if rank in self._nodes
        )

    def stop(self, attempt: int, how: StopOrder) -> None:
        """Send all workers the order to stop an attempt; dead workers are ignored."""
        for rank, worker in self._handles.workers.items():
            self._orders.send(f"worker-{rank}", worker, "stop", attempt, how)

    def order_scheduler(self, method: str, *args: Any) -> None:
        """Send an order to the task scheduler."""
        self._orders.send("task-scheduler", self._handles.scheduler, method, *args)

    def poll_orders(self) -> list[tuple[str, DistplatError]]:
        """Resend lost orders; return the roles whose order failed, with the error."""
        return self._orders.poll()

    def carry_out(
        self, restart: Restart, saved: StoredCheckpoint | None = None, checkpoint_step: int = 0
    ) -> None:
        """
        Kill and respawn the actors to replace, and send all workers the orders of the attempt.

        Args:
            restart: decision of the state machine.
            saved: the checkpoint to start from, if all actors are restarted.
            checkpoint_step: step of the newest checkpoint.
        """
        launch = self.launch
        self._attempt = restart.attempt
        if restart.world is not None:
            self.job = self.job.with_workers(restart.world)
        if restart.restarts_all:
            self._handles.end()
            self._spawned_job = self.job
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
        self._order_all(restart.attempt, saved, checkpoint_step)

    def _replacement(self, attempt: int, rank: int) -> Any:
        """Return a worker for a lost rank: the spare of its node, or a new process."""
        node = self._nodes.pop(rank, None)
        spare = self._spares.take(node) if self._spares is not None and node is not None else None
        if spare is not None:
            return spare
        placement = self._handles.renewed_placement(rank)
        return spawn_worker(self.job, self.launch.run, attempt, rank, placement)

    def _resize(self, world: int) -> None:
        """Kill the workers of ranks from `world` on, and promote newcomers that are ready."""
        for rank in [rank for rank in self._handles.workers if rank >= world]:
            self.end_worker(rank)
        for rank in range(world):
            if rank not in self._handles.workers:
                self._handles.workers[rank] = self._handles.newcomers.pop(rank)

    def start_newcomer(self, rank: int, checkpoint_step: int) -> Callable[[], Any]:
        """
        Start a worker that will join; return a function that makes it build model and data.

        The function returns the reference of a call, and is idempotent.

        Args:
            rank: future rank of the worker.
            checkpoint_step: step of the newest checkpoint.
        """
        self._newcomer_count += 1
        name = f"{self._attempt + 1}.{self._newcomer_count}"
        worker = spawn_worker(self.job, self.launch.run, name, rank)
        self._handles.newcomers[rank] = worker
        return partial(
            worker.prepare.remote, self._order(self._attempt + 1, rank, None, checkpoint_step)
        )

    def end_newcomer(self, rank: int) -> None:
        """Kill a worker that has not joined yet."""
        ray.kill(self._handles.newcomers.pop(rank))

    def _replace_coordinators(self, restart: Restart) -> None:
        launch, handles = self.launch, self._handles
        arguments = self._spawned_job, launch.roles, launch.run, restart.attempt
        if "server-manager" in restart.coordinators:
            ray.kill(handles.manager)  # may be frozen rather than dead
            handles.manager = spawn_manager(*arguments, handles, adopts=True)
            self._manager_attempt = restart.attempt
        if "task-scheduler" in restart.coordinators:
            ray.kill(handles.scheduler)
            handles.scheduler = spawn_scheduler(*arguments)

    def set_controller(self, controller: Any) -> None:
        """Set the controller's handle: the server manager requests new servers from it."""
        self._controller = controller
        self._send_controller()

    def _send_controller(self) -> None:
        """Send the controller's handle to the current server manager."""
        if self._handles.manager is not None:
            manager = self._handles.manager
            self._orders.send("server-manager", manager, "begin", self._controller)

    def make_server(self, attempt: int, server: str, beside: str) -> Any:
        """
        Create a server node for the manager and return its handle. Idempotent.

        Args:
            attempt: attempt for which the manager was spawned.
            server: name of the server.
            beside: node to avoid if possible.

        Raises:
            FencedError: the manager has been replaced.
        """
        if attempt != self._manager_attempt:
            raise FencedError(f"{server} is for the server manager of attempt {attempt}")
        launch, handles = self.launch, self._handles
        tables = server.startswith("embedding-")
        servers = handles.embedding_servers if tables else handles.servers
        if server not in servers:
            arguments = self._spawned_job, launch.roles, launch.run, self._attempt
            servers[server] = spawn_server(*arguments, server, beside)
        return servers[server]

    def grow(self, count: int, checkpoint_step: int) -> list[int]:
        """
        Start workers that join a run with leased tasks; return their new ranks.

        Args:
            count: number of workers.
            checkpoint_step: step of the newest checkpoint.
        """
        launch = self.launch
        ranks = list(range(self._next_rank, self._next_rank + count))
        self._next_rank += count
        for rank in ranks:
            self._handles.workers[rank] = spawn_worker(launch.job, launch.run, self._attempt, rank)
        self._start_workers(
            [self._order(self._attempt, rank, None, checkpoint_step) for rank in ranks]
        )
        return ranks

    def end_worker(self, rank: int) -> None:
        """Kill a worker that has left the run."""
        ray.kill(self._handles.workers.pop(rank))

    def end(self) -> None:
        """Kill all actors."""
        call_all([*([self._spares.end] if self._spares is not None else []), self._handles.end])

    def _order_all(
        self, attempt: int, saved: StoredCheckpoint | None, checkpoint_step: int
    ) -> None:
        handle = _put_checkpoint(saved) if saved is not None else None
        self._start_workers(
            [self._order(attempt, rank, handle, checkpoint_step) for rank in self._handles.workers]
        )

    def _start_workers(self, orders: list[WorkOrder]) -> None:
        for order in orders:
            worker = self._handles.workers[order.rank]
            self._orders.send(f"worker-{order.rank}", worker, "start", order)

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
    Put a checkpoint into Ray's object store.

    Raises:
        StorageError: a file of the checkpoint is invalid.
    """
    files = {}
    for name, content in saved.files.items():
        try:
            tensors = decode(content)
        except ValueError as error:
            raise StorageError(f"{saved.path / name}: {error}") from None
        files[name.removesuffix(".safetensors")] = [ray.put(tensors)]
    return SavedHandle(saved.state, files)
