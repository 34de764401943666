"""
The one module that makes actors: names, resources, order of start, end.

All actors of a run are asked for at once and start side by side. None is detached and none is
restarted by Ray: they end with their owner (I8), and a shard must not come back empty (I4).
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
"""Threads of a worker for the controller's calls, of which one keeps its answer back."""
_READERS = "readers"
ray.method(concurrency_group=_READERS)(Worker.weights)
"""Whoever reads a run's weights, any number of processes, has one thread of a worker, and none of
those by which the controller hears that it lives."""
_CONTROLLER_THREADS = 8
"""Threads of the controller: for the run, for the driver, and for who asks by name."""
_SCRIPT_THREADS = 4
"""Threads of a script's actor: one waits for output."""
_SERVER_THREADS = 8
"""Threads of a server node beside two per worker: for the manager's and the controller's calls."""


_LEAST = 0.0001
"""Of a resource: less Ray does not count."""
_WHY_THERE = (
    "where the run stays: it began on a cluster of one node, and shipped nothing to others; "
    "stop it, and `submit --resume` uses all nodes"
)
_NOTHING = {"CPU": 0.0}
"""Resources of an actor that works while others wait."""


@dataclass
class ActorHandles:
    """The actors of a run."""

    workers: dict[int, Any] = field(default_factory=dict)
    """By rank."""
    newcomers: dict[int, Any] = field(default_factory=dict)
    """By the rank that they are to have: workers that make themselves ready."""
    servers: dict[str, Any] = field(default_factory=dict)
    """Server nodes by name."""
    manager: Any = None
    placement_groups: list[Any] = field(default_factory=list)
    """A placement group for each worker group of several workers."""
    embedding_servers: dict[str, Any] = field(default_factory=dict)
    """Servers of embedding tables by name."""
    scheduler: Any = None

    def end(self) -> None:
        """Kill all of them; the dead are passed over."""
        alone = [actor for actor in (self.manager, self.scheduler) if actor is not None]
        workers = [*self.workers.values(), *self.newcomers.values()]
        servers = [*self.servers.values(), *self.embedding_servers.values()]
        kills = [partial(ray.kill, actor) for actor in [*workers, *alone, *servers]]
        call_all([*kills, *(partial(remove_placement_group, one) for one in self.placement_groups)])

    def replicated_tables(self, job: Job) -> dict[str, Any]:
        """Give the servers of embedding tables that the manager looks after."""
        kept_twice = job.embeddings is not None and job.embeddings.replication > 1
        return self.embedding_servers if kept_twice else {}

    @property
    def _group_size(self) -> int:
        return int(self.placement_groups[0].bundle_count) if self.placement_groups else 1

    def placement(self, rank: int) -> PlacementGroupSchedulingStrategy | None:
        """Say where a worker belongs; None: anywhere."""
        if rank >= len(self.placement_groups) * self._group_size:
            return None
        group, bundle = divmod(rank, self._group_size)
        return PlacementGroupSchedulingStrategy(self.placement_groups[group], bundle)

    def renewed_placement(self, rank: int) -> PlacementGroupSchedulingStrategy | None:
        """Say where a worker that replaces another belongs: its group may have been removed."""
        if rank < len(self.placement_groups) * self._group_size:
            group = rank // self._group_size
            old = self.placement_groups[group]
            if placement_group_table(old).get("state") == "REMOVED":
                self.placement_groups[group] = placement_group(old.bundle_specs, strategy="PACK")
        return self.placement(rank)


def spawn(job: Job, roles: Roles, run: str, attempt: int) -> ActorHandles:
    """
    Ask Ray for all actors of a run; returns before they are up.

    Raises:
        SpecError: the cluster will never have what the job asks for.
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
        part = f"embedding-server-{index}"
        handles.embedding_servers[part] = spawn_server(job, roles, run, attempt, part)
    if roles.servers and not job.own_loop:
        handles.scheduler = spawn_scheduler(job, roles, run, attempt)
    if roles.servers or handles.replicated_tables(job):
        handles.manager = spawn_manager(job, roles, run, attempt, handles)


@dataclass
class ScriptActors:
    """The actors of a script that is run as it is."""

    processes: list[Any]
    placement_group: Any

    def end(self) -> None:
        """Kill all of them; the dead are passed over."""
        kills = [partial(ray.kill, actor) for actor in self.processes]
        call_all([*kills, partial(remove_placement_group, self.placement_group)])


def spawn_script(scaling: Scaling, run: str, attempt: int) -> ScriptActors:
    """
    Ask Ray for an actor for each process of a script, on few nodes; returns before they are up.

    Raises:
        SpecError: the cluster will never have what is asked for.
    """
    needs = scaling.resources()
    _check_room([needs] * scaling.num_workers, _OF_SCRIPT)
    bundles = [needs | _where()] * scaling.num_workers
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
    """Ask Ray for the server manager; `adopts`: the servers have had another one before."""
    name = actor_name(job, "server-manager", attempt)
    # Two per worker wait for newer maps, of shards and of tables; some are for anything else.
    options = _options(run, name, _NOTHING, _threads(job, roles))
    manager = ray.remote(ServerManager).options(**options)
    tables = handles.replicated_tables(job)
    return manager.remote(
        name, job, run, attempt, handles.servers, roles, tables=tables, adopts=adopts
    )


def spawn_server(
    job: Job, roles: Roles, run: str, attempt: int, role: str, beside: str | None = None
) -> Any:
    """
    Ask Ray for one server node; returns before it is up.

    Args:
        job: the run's job.
        roles: what a server needs.
        run: its name.
        attempt: its generation.
        role: the server's, for its name.
        beside: the node of the server that this one is a backup of: another is preferred.
    """
    name = actor_name(job, role, attempt)
    # Two per worker: one answers its mailbox, one its calls.
    needs, part = _server_needs(job, roles, role)
    options = _options(run, name, needs, _threads(job, roles))
    others = _nodes_but(beside, needs | _where()) if beside is not None else []
    if others:
        turn = int(role.rpartition("-")[2]) % len(others)
        # A soft affinity would read better, but Ray 2.60 often does not follow it for actors.
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(others[turn], soft=False)
    return ray.remote(ServerNode).options(**options).remote(name, tables=part)


def _server_needs(job: Job, roles: Roles, role: str) -> tuple[dict[str, float], TablePart | None]:
    """Give a server node's resources, and where it is one of embedding tables, its part."""
    if not role.startswith("embedding-"):
        return roles.server_resources or _NOTHING, None
    assert job.embeddings is not None, "only such jobs have servers of tables"
    tables, limit_s = job.embeddings, job.failure.step_timeout_s
    index = int(role.rpartition("-")[2])  # a backup's is that of its primary, which tells it
    part = TablePart(role, index, tables.replication > 1, limit_s)
    return tables.resources_per_server, part


def _threads(job: Job, roles: Roles) -> int:
    """Count two threads for each worker that there may be at a time, and some for others."""
    return 2 * (job.scaling.world + room(roles)) + _SERVER_THREADS


def room(roles: Roles) -> int:
    """Count the workers that may come while a run goes on; 0: their number does not change."""
    return ROOM if roles.consistency.dynamic_tasks or roles.resizes else 0


def spawn_scheduler(job: Job, roles: Roles, run: str, attempt: int) -> Any:
    """Ask Ray for the task scheduler."""
    name = actor_name(job, "task-scheduler", attempt)
    scheduler = ray.remote(Scheduler).options(**_options(run, name, _NOTHING))
    return scheduler.remote(name, job, roles.consistency)


def spawn_controller(controller: type, job: Job, run: str) -> Any:
    """Ask Ray for the controller, on this process's own node: no other node's end takes it."""
    name = actor_name(job, "controller", 0)
    own_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = _options(run, name, _NOTHING, _CONTROLLER_THREADS) | {"scheduling_strategy": own_node}
    return ray.remote(controller).options(**options).remote(name, ray_compat.submission_id())


def _nodes_but(node: str, needs: dict[str, float]) -> list[str]:
    """Give the other nodes that have room now."""
    nodes = ray_compat.free_resources().items()
    return sorted(name for name, free in nodes if name != node and _fits(needs, free))


def spawn_worker(
    job: Job,
    run: str,
    attempt: int | str,
    rank: int,
    placement: PlacementGroupSchedulingStrategy | None = None,
) -> Any:
    """Ask Ray for one worker, where it has its place; returns before it is up."""
    name = actor_name(job, f"worker-{rank}", attempt)
    return _worker(run, name, job.scaling.resources(), placement)


def spawn_spare(job: Job, run: str, node: str, number: int) -> Any:
    """Ask Ray for a process on a node that may become a worker; returns before it is up."""
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    return _worker(run, actor_name(job, f"spare-{number}", 0), _NOTHING, affinity)


def _worker(run: str, name: str, needs: dict[str, float], where: object | None) -> Any:
    options = _options(run, name, needs, _WORKER_THREADS) | hash_seed.options()
    if where is not None:
        options["scheduling_strategy"] = where
    return ray.remote(concurrency_groups={_READERS: 1})(Worker).options(**options).remote(name)


def lacks(job: Job, more: int) -> str:
    """Say what is missing now for `more` workers where the run may be; empty: nothing."""
    where, nodes = _where(), ray_compat.free_resources().values()
    ours = [node for node in nodes if _fits(where, node)]
    missing = [
        f"{amount * more:g} {name}, of which {free:g} are free"
        for name, amount in job.scaling.resources().items()
        if amount * more > (free := sum(node.get(name, 0.0) for node in ours))
    ]
    who = "1 more worker needs" if more == 1 else f"{more} more workers need"
    remedy = "; the job's `scaling.resources_per_worker` says what one takes"
    if len(ours) < len(nodes):
        remedy = f" on the driver's machine, {_WHY_THERE}"
    return f"{who} {', and '.join(missing)}{remedy}" if missing else ""


def _where() -> dict[str, float]:
    """
    Give what an actor needs beside its own resources: that of the driver's machine, or nothing.

    To one machine nothing is shipped. Other nodes may join later, and a folder of the same path
    may be there, last week's or somebody else's.
    """
    if not ray_compat.stays_on_machine():
        return {}
    return {f"node:{ray.util.get_node_ip_address()}": _LEAST}  # each node has 1 of its address


def actor_name(job: Job, role: str, attempt: int | str) -> str:
    """Give an actor's name; one that is made later in a run says for which attempt."""
    return f"{job.name}/{role}" + (f"/attempt-{attempt}" if attempt else "")


def _placement_groups(job: Job, group_size: int) -> list[Any]:
    """
    Reserve room for each worker group: on one node if one has it, for they talk most.

    A worker by itself needs none, but where a spare may take its place, and then its room.
    """
    needs = {name: amount for name, amount in job.scaling.resources().items() if amount}
    if (group_size == 1 and not job.failure.spare_workers) or not needs:
        return []
    bundles = [needs | _where()] * group_size
    groups = job.scaling.num_workers // group_size
    return [placement_group(bundles, strategy="PACK") for _ in range(groups)]


def _options(
    run: str, name: str, needs: dict[str, float], threads: int | None = None
) -> dict[str, Any]:
    """Give the arguments of `options` for an actor; `threads`: calls that run at once."""
    options = {"namespace": run, "name": name, "max_restarts": 0, "max_task_retries": 0}
    options |= _resources(needs | _where())
    return options if threads is None else options | {"max_concurrency": threads}


def _resources(needs: dict[str, float]) -> dict[str, Any]:
    """Translate Ray Train's resource names into the arguments of `options`."""
    named = ("CPU", "GPU", "memory")  # of these `options` has arguments, and refuses the names
    rest = {name: amount for name, amount in needs.items() if name not in named}
    options = {"num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0), "resources": rest}
    return options | ({"memory": int(needs["memory"])} if needs.get("memory") else {})


def _check_feasible(job: Job, roles: Roles) -> None:
    """Refuse what no waiting will bring, instead of leaving it pending for ever."""
    needs = [job.scaling.resources()] * job.scaling.num_workers
    needs += [roles.server_resources or {}] * (roles.servers * roles.replication)
    if job.embeddings is not None:
        tables = job.embeddings
        needs += [tables.resources_per_server] * (tables.servers * tables.replication)
    _check_room(needs)


_OF_JOB = "scaling", "scaling.num_workers", "scaling.resources_per_worker or resources_per_server"
_OF_SCRIPT = "--num-workers", "--num-workers", "--cpus-per-worker or --gpus-per-worker"
"""What asks for too much; what says how many, and how large each is."""


def _check_room(
    needs: Sequence[Mapping[str, float]], settings: tuple[str, str, str] = _OF_JOB
) -> None:
    """
    Compare what actors need with what the cluster has, and the largest with what one node has.

    Args:
        needs: of each actor.
        settings: which the error names; see `_OF_JOB`.

    Raises:
        SpecError: it will never have that much.
    """
    where, count, size = settings
    total: dict[str, float] = {}
    for need in needs:
        for name, amount in need.items():
            total[name] = total.get(name, 0.0) + amount
    available = ray.cluster_resources()
    missing = {name: amount for name, amount in total.items() if amount > available.get(name, 0.0)}
    if missing:
        lacks = ", ".join(f"{amount:g} {name}" for name, amount in missing.items())
        has = ", ".join(f"{available.get(name, 0.0):g} {name}" for name in missing)
        hint = f"lower {count}, {size}, or add nodes"
        text = f"the job needs {lacks}; the cluster has {has}"
        raise SpecError(Problem((where,), text, hint))
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
            raise SpecError(Problem((where,), text, f"lower {size}, or add such a node"))


def _fits(need: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(amount <= node.get(name, 0.0) for name, amount in need.items())
