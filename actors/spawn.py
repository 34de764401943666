"""
The only module that creates actors: their names, resources and placement.

All actors of a run are created at once and start in parallel. No actor is detached or restarted by
Ray: actors end with their owner (I8), and a shard must not come back empty (I4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from distplat.actors import hash_seed, ray_compat
from distplat.actors.messages import TablePart
from distplat.actors.ray_transport import location_here
from distplat.actors.script_process import ScriptProcess
from distplat.actors.servers.manager import ServerManager
from distplat.actors.servers.node import ServerNode
from distplat.actors.servers.scheduler import ROOM, Scheduler
from distplat.actors.stopping import call_all
from distplat.actors.worker import Worker
from distplat.platform.errors import Problem, SpecError
from distplat.platform.spec import Job, Scaling
from distplat.strategies.strategy_spec import Roles

_WORKER_THREADS = 4
"""Threads of a worker for the controller's calls; an open poll occupies one of them."""
_READERS = "readers"
ray.method(concurrency_group=_READERS)(Worker.weights)
"""Readers of a run's weights, any number of processes, share one thread of a worker. They never
occupy the threads that answer the controller's polls."""
_CONTROLLER_THREADS = 8
"""Threads of the controller: for the run, the driver, and clients such as `distplat scale`."""
_SCRIPT_THREADS = 4
"""Threads of a script's actor; one of them waits for output."""
_SERVER_THREADS = 8
"""Threads of a server node besides two per worker: for calls of the manager and the controller."""
_MIN_AMOUNT = 0.0001
"""Smallest amount of a resource that Ray accounts for."""
_ONE_MACHINE = (
    "where the run stays: it began on a cluster of one node, and shipped nothing to others; "
    "stop it, and `submit --resume` uses all nodes"
)
_NO_RESOURCES = {"CPU": 0.0}
"""Resources of an actor that works only while others wait."""


@dataclass
class ActorHandles:
    """The actors of a run."""

    workers: dict[int, Any] = field(default_factory=dict)
    """Workers by rank."""
    newcomers: dict[int, Any] = field(default_factory=dict)
    """Workers that build model and data before they join, by future rank."""
    servers: dict[str, Any] = field(default_factory=dict)
    """Server nodes by name."""
    manager: Any = None
    placement_groups: list[Any] = field(default_factory=list)
    """One placement group per worker group, if worker groups have several workers."""
    embedding_servers: dict[str, Any] = field(default_factory=dict)
    """Servers of embedding tables by name."""
    scheduler: Any = None

    def end(self) -> None:
        """Kill all actors; dead ones are ignored."""
        coordinators = [actor for actor in (self.manager, self.scheduler) if actor is not None]
        workers = [*self.workers.values(), *self.newcomers.values()]
        servers = [*self.servers.values(), *self.embedding_servers.values()]
        kills = [partial(ray.kill, actor) for actor in [*workers, *coordinators, *servers]]
        removals = [partial(remove_placement_group, group) for group in self.placement_groups]
        call_all([*kills, *removals])

    def replicated_tables(self, job: Job) -> dict[str, Any]:
        """Return the embedding servers that have a backup; the server manager polls them."""
        replicated = job.embeddings is not None and job.embeddings.replication > 1
        return self.embedding_servers if replicated else {}

    @property
    def _group_size(self) -> int:
        return int(self.placement_groups[0].bundle_count) if self.placement_groups else 1

    def placement(self, rank: int) -> PlacementGroupSchedulingStrategy | None:
        """Return the placement of a worker; None: any node."""
        if rank >= len(self.placement_groups) * self._group_size:
            return None
        group, bundle = divmod(rank, self._group_size)
        return PlacementGroupSchedulingStrategy(self.placement_groups[group], bundle)

    def renewed_placement(self, rank: int) -> PlacementGroupSchedulingStrategy | None:
        """Return the placement of a replacement; recreate its placement group if removed."""
        if rank < len(self.placement_groups) * self._group_size:
            group = rank // self._group_size
            old = self.placement_groups[group]
            if placement_group_table(old).get("state") == "REMOVED":
                self.placement_groups[group] = placement_group(old.bundle_specs, strategy="PACK")
        return self.placement(rank)


def spawn(job: Job, roles: Roles, run: str, attempt: int) -> ActorHandles:
    """
    Create all actors of a run, without waiting until they are up.

    Raises:
        SpecError: the cluster can never provide the resources of the job.
    """
    _check_feasible(job, roles)
    handles = ActorHandles()
    try:
        _spawn_all(handles, job, roles, run, attempt)
    except BaseException:
        handles.end()
        raise
    return handles


def _spawn_all(handles: ActorHandles, job: Job, roles: Roles, run: str, attempt: int) -> None:
    handles.placement_groups = _placement_groups(job, roles.group_size)
    for rank in range(job.scaling.num_workers):
        handles.workers[rank] = spawn_worker(job, run, attempt, rank, handles.placement(rank))
    for index in range(roles.servers):
        name = f"server-{index}"
        handles.servers[name] = spawn_server(job, roles, run, attempt, name)
    for index in range(job.embeddings.servers if job.embeddings is not None else 0):
        name = f"embedding-server-{index}"
        handles.embedding_servers[name] = spawn_server(job, roles, run, attempt, name)
    if roles.servers and not job.own_loop:
        handles.scheduler = spawn_scheduler(job, roles, run, attempt)
    if roles.servers or handles.replicated_tables(job):
        handles.manager = spawn_manager(job, roles, run, attempt, handles)


@dataclass
class ScriptActors:
    """The actors of a script that `distplat` runs unchanged."""

    processes: list[Any]
    placement_group: Any

    def end(self) -> None:
        """Kill all actors; dead ones are ignored."""
        kills = [partial(ray.kill, actor) for actor in self.processes]
        call_all([*kills, partial(remove_placement_group, self.placement_group)])


def spawn_script(scaling: Scaling, run: str, attempt: int) -> ScriptActors:
    """
    Create an actor per process of a script, on few nodes, without waiting until they are up.

    Raises:
        SpecError: the cluster can never provide the resources.
    """
    needs = scaling.resources()
    _check_room([needs] * scaling.num_workers, _OF_SCRIPT)
    bundles = [needs | _machine_resource()] * scaling.num_workers
    actors = ScriptActors([], placement_group(bundles, strategy="PACK"))
    try:
        for index in range(scaling.num_workers):
            name = f"process-{index}" + (f"/attempt-{attempt}" if attempt else "")
            options = _options(run, name, needs, _SCRIPT_THREADS)
            bundle = PlacementGroupSchedulingStrategy(actors.placement_group, index)
            options["scheduling_strategy"] = bundle
            actor = ray.remote(ScriptProcess).options(**options).remote(location_here)
            actors.processes.append(actor)
    except BaseException:
        actors.end()
        raise
    return actors


def spawn_manager(
    job: Job, roles: Roles, run: str, attempt: int, handles: ActorHandles, *, adopts: bool = False
) -> Any:
    """Create the server manager; `adopts`: it takes over the servers of a lost manager."""
    name = actor_name(job, "server-manager", attempt)
    # Two threads per worker wait for newer maps, of shards and of tables.
    options = _options(run, name, _NO_RESOURCES, _threads(job, roles))
    manager = ray.remote(ServerManager).options(**options)
    tables = handles.replicated_tables(job)
    return manager.remote(
        name, job, run, attempt, handles.servers, roles, tables=tables, adopts=adopts
    )


def spawn_server(
    job: Job, roles: Roles, run: str, attempt: int, role: str, beside: str | None = None
) -> Any:
    """
    Create one server node, without waiting until it is up.

    Args:
        job: job of the run.
        roles: has the resources of a server.
        run: name of the run.
        attempt: attempt for which the server is created.
        role: role of the server, such as `server-0`.
        beside: for a backup, the node of its primary; another node is preferred.
    """
    name = actor_name(job, role, attempt)
    # Two threads per worker: one serves its mailbox, one its calls.
    needs, part = _server_needs(job, roles, role)
    options = _options(run, name, needs, _threads(job, roles))
    others = _other_nodes(beside, needs | _machine_resource()) if beside is not None else []
    if others:
        choice = int(role.rpartition("-")[2]) % len(others)
        # A soft affinity would read better, but Ray 2.60 often does not follow it for actors.
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(others[choice], soft=False)
    return ray.remote(ServerNode).options(**options).remote(name, tables=part)


def _server_needs(job: Job, roles: Roles, role: str) -> tuple[dict[str, float], TablePart | None]:
    """Return a server node's resources and, for an embedding server, its part."""
    if not role.startswith("embedding-"):
        return roles.server_resources or _NO_RESOURCES, None
    assert job.embeddings is not None, "only jobs with embeddings have embedding servers"
    tables, limit_s = job.embeddings, job.failure.step_timeout_s
    index = int(role.rpartition("-")[2])  # a backup receives its index from the primary
    part = TablePart(role, index, tables.replication > 1, limit_s)
    return tables.resources_per_server, part


def _threads(job: Job, roles: Roles) -> int:
    """Return the number of threads: two per possible worker, and some for other callers."""
    return 2 * (job.scaling.world + spare_room(roles)) + _SERVER_THREADS


def spare_room(roles: Roles) -> int:
    """Return how many workers may be added during a run; 0: it cannot be resized."""
    return ROOM if roles.consistency.dynamic_tasks or roles.resizes else 0


def spawn_scheduler(job: Job, roles: Roles, run: str, attempt: int) -> Any:
    """Create the task scheduler."""
    name = actor_name(job, "task-scheduler", attempt)
    scheduler = ray.remote(Scheduler).options(**_options(run, name, _NO_RESOURCES))
    return scheduler.remote(name, job, roles.consistency)


def spawn_controller(controller: type, job: Job, run: str) -> Any:
    """Create the controller on the driver's node, so that no other node's failure affects it."""
    name = actor_name(job, "controller", 0)
    own_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = _options(run, name, _NO_RESOURCES, _CONTROLLER_THREADS) | {
        "scheduling_strategy": own_node
    }
    return ray.remote(controller).options(**options).remote(name, ray_compat.submission_id())


def _other_nodes(node: str, needs: dict[str, float]) -> list[str]:
    """Return the other nodes with enough free resources."""
    nodes = ray_compat.free_resources().items()
    return sorted(name for name, free in nodes if name != node and _fits(needs, free))


def spawn_worker(
    job: Job,
    run: str,
    attempt: int | str,
    rank: int,
    placement: PlacementGroupSchedulingStrategy | None = None,
) -> Any:
    """Create one worker, without waiting until it is up."""
    name = actor_name(job, f"worker-{rank}", attempt)
    return _spawn_worker(run, name, job.scaling.resources(), placement)


def spawn_spare(job: Job, run: str, node: str, number: int) -> Any:
    """Create a spare worker on a node, without waiting until it is up."""
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    return _spawn_worker(run, actor_name(job, f"spare-{number}", 0), _NO_RESOURCES, affinity)


def _spawn_worker(run: str, name: str, needs: dict[str, float], placement: object | None) -> Any:
    options = _options(run, name, needs, _WORKER_THREADS) | hash_seed.options()
    if placement is not None:
        options["scheduling_strategy"] = placement
    return ray.remote(concurrency_groups={_READERS: 1})(Worker).options(**options).remote(name)


def lacks(job: Job, more: int) -> str:
    """Return which free resources are missing for `more` workers; empty: none."""
    required, nodes = _machine_resource(), ray_compat.free_resources().values()
    allowed = [node for node in nodes if _fits(required, node)]
    missing = [
        f"{amount * more:g} {name}, of which {free:g} are free"
        for name, amount in job.scaling.resources().items()
        if amount * more > (free := sum(node.get(name, 0.0) for node in allowed))
    ]
    subject = "1 more worker needs" if more == 1 else f"{more} more workers need"
    remedy = "; the job's `scaling.resources_per_worker` says what one takes"
    if len(allowed) < len(nodes):
        remedy = f" on the driver's machine, {_ONE_MACHINE}"
    return f"{subject} {', and '.join(missing)}{remedy}" if missing else ""


def _machine_resource() -> dict[str, float]:
    """
    Return the resource that ties an actor to the driver's machine, or nothing.

    On a cluster of one machine no code is shipped. Nodes that join later may have a folder of the
    same path with other contents.
    """
    if not ray_compat.stays_on_machine():
        return {}
    return {f"node:{ray.util.get_node_ip_address()}": _MIN_AMOUNT}  # each node has 1.0 of this


def actor_name(job: Job, role: str, attempt: int | str) -> str:
    """Return an actor's name, with its attempt unless that is 0."""
    return f"{job.name}/{role}" + (f"/attempt-{attempt}" if attempt else "")


def _placement_groups(job: Job, group_size: int) -> list[Any]:
    """
    Reserve resources per worker group, on one node if possible: its workers communicate most.

    Groups of one worker need this only with spare workers, for which it reserves the resources.
    """
    needs = {name: amount for name, amount in job.scaling.resources().items() if amount}
    if (group_size == 1 and not job.failure.spare_workers) or not needs:
        return []
    bundles = [needs | _machine_resource()] * group_size
    groups = job.scaling.num_workers // group_size
    return [placement_group(bundles, strategy="PACK") for _ in range(groups)]


def _options(
    run: str, name: str, needs: dict[str, float], threads: int | None = None
) -> dict[str, Any]:
    """Return the arguments of `options` for an actor; `threads`: number of concurrent calls."""
    options = {"namespace": run, "name": name, "max_restarts": 0, "max_task_retries": 0}
    options |= _resources(needs | _machine_resource())
    return options if threads is None else options | {"max_concurrency": threads}


def _resources(needs: dict[str, float]) -> dict[str, Any]:
    """Convert Ray Train's resource names to the arguments of `options`."""
    named = ("CPU", "GPU", "memory")  # `options` has arguments for these and rejects the names
    rest = {name: amount for name, amount in needs.items() if name not in named}
    options = {"num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0), "resources": rest}
    return options | ({"memory": int(needs["memory"])} if needs.get("memory") else {})


def _check_feasible(job: Job, roles: Roles) -> None:
    """Raise if the cluster can never place all actors; they would be pending forever."""
    needs = [job.scaling.resources()] * job.scaling.num_workers
    needs += [roles.server_resources or {}] * (roles.servers * roles.replication)
    if job.embeddings is not None:
        tables = job.embeddings
        needs += [tables.resources_per_server] * (tables.servers * tables.replication)
    _check_room(needs)


_OF_JOB = "scaling", "scaling.num_workers", "scaling.resources_per_worker or resources_per_server"
_OF_SCRIPT = "--num-workers", "--num-workers", "--cpus-per-worker or --gpus-per-worker"
"""Settings named in the error: field, number of processes, size of each."""


def _check_room(
    needs: Sequence[Mapping[str, float]], settings: tuple[str, str, str] = _OF_JOB
) -> None:
    """
    Compare the needs of all actors with the cluster, and those of each actor with single nodes.

    Args:
        needs: resources of each actor.
        settings: settings named in the error; see `_OF_JOB`.

    Raises:
        SpecError: the cluster or every node has too little.
    """
    field_name, count, size = settings
    total: dict[str, float] = {}
    for need in needs:
        for name, amount in need.items():
            total[name] = total.get(name, 0.0) + amount
    available = ray.cluster_resources()
    missing = {name: amount for name, amount in total.items() if amount > available.get(name, 0.0)}
    if missing:
        needed = ", ".join(f"{amount:g} {name}" for name, amount in missing.items())
        has = ", ".join(f"{available.get(name, 0.0):g} {name}" for name in missing)
        hint = f"lower {count}, {size}, or add nodes"
        text = f"the job needs {needed}; the cluster has {has}"
        raise SpecError(Problem((field_name,), text, hint))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for need in needs:
        if not any(_fits(need, node) for node in nodes):
            wants = ", ".join(f"{amount:g} {name}" for name, amount in need.items() if amount)
            largest = ", ".join(
                f"{max(node.get(name, 0.0) for node in nodes):g} {name}"
                for name, amount in need.items()
                if amount
            )
            text = f"one process needs {wants}, which no node has; at most, a node has {largest}"
            raise SpecError(Problem((field_name,), text, f"lower {size}, or add such a node"))


def _fits(need: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(amount <= node.get(name, 0.0) for name, amount in need.items())
