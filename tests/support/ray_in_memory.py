"""
An in-process replacement of the parts of Ray that distplat uses: runs without a cluster.

    driver, controller, actor group, workers, servers      distplat's own, unchanged
    ray.remote, get, wait, put, kill, ray_compat           replaced, over `LocalCluster`

A process is a name that its threads inherit, see `in_memory_processes`. Actors end with the process
that created them.
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ray
import torch
from in_memory_processes import Killed, Process, process_here, this_process
from ray import exceptions
from ray._private import auto_init_hook

from distplat.actors import (
    controller_actor,
    hash_seed,
    launch,
    ray_compat,
    ray_transport,
    spawn,
    training,
)
from distplat.actors.collectives import ray_groups
from distplat.actors.head_watch import HeadWatch
from distplat.actors.local_transport import Actor, LocalCluster, StoredObject
from distplat.actors.ray_transport import RayTransport
from distplat.actors.transport import ActorDied, AnswerPending, TransportError, Unanswered
from distplat.actors.worker import Worker
from distplat.platform.errors import DistplatError
from distplat.platform.run_directory import CURVES
from distplat.platform.stop_order import StopOrder

JOIN_TIMEOUT_S = 5.0
"""Deadline for the end of all threads."""
BLOCKING_THREADS = ("checkpoints", "listen", "metrics", CURVES, "printed lines", "poll")
"""Names of threads that may block for long, but call no actors."""
auto_init_hook.enable_auto_connect = False  # late threads must not start Ray


class _Body:
    """
    An actor's object, created in a separate thread as by Ray; calls wait for it.

    Args:
        process: of the actor.
        make: creates the object.
        failed: called with the cause if the constructor fails.
    """

    def __init__(
        self, process: Process, make: Callable[[], Any], failed: Callable[[str], None]
    ) -> None:
        self._process, self._make, self._failed = process, make, failed
        self._instance: Future[Any] = Future()
        with process.entered():
            threading.Thread(target=self._construct, daemon=True, name=process.name).start()

    def _construct(self) -> None:
        try:
            self._instance.set_result(self._make())
        except BaseException as error:
            self._instance.set_exception(error)
            self._failed(f"it could not be created: {error}")

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        bound = getattr(self._instance.result(), method)
        self._process.check()
        if inspect.iscoroutinefunction(bound):
            return functools.partial(self._await, bound)
        return functools.partial(self._call, bound)

    def _call(self, bound: Callable[..., Any], *args: Any) -> Any:
        with self._process.entered():
            self._process.check()
            answer = bound(*args)
            self._process.check()
            return answer

    async def _await(self, bound: Callable[..., Any], *args: Any) -> Any:
        return await bound(*args)

    def close(self) -> None:
        """End the process, and release the resources that the kernel would free."""
        self._process.end()
        threading.Thread(target=self._release, daemon=True, name="let go").start()

    def _release(self) -> None:
        if not self._instance.done() or self._instance.exception() is not None:
            return
        body = self._instance.result()
        if isinstance(body, Worker):
            _end_worker(body)
        elif hasattr(body, "close"):
            with suppress(Exception):
                body.close()


def _end_worker(body: Worker) -> None:
    """End the waits of a worker's threads, and the threads."""
    session = body._session
    body.stop(session.state.attempt if session is not None else 0, StopOrder.ABANDON)

    def leave(_: object) -> None:
        raise Killed

    body._orders.put(leave)


class Handle:
    """An actor's handle: `handle.method.remote(...)` returns the reply."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):
            raise AttributeError(method)
        return SimpleNamespace(remote=functools.partial(_call, self._actor, method))

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, (self._actor,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other._actor is self._actor

    def __hash__(self) -> int:
        return hash(id(self._actor))


class _Stored(StoredObject):
    """An object in the store; it is lost with the process that put it there."""

    def __init__(self, value: Any, owner: Process) -> None:
        super().__init__(value)
        self.owner = owner


class _Remote:
    """Result of `ray.remote` of a class."""

    def __init__(self, cluster: InMemoryRay, cls: type, options: dict[str, Any]) -> None:
        self._cluster, self._cls, self._options = cluster, cls, options

    def options(self, **options: Any) -> _Remote:
        return _Remote(self._cluster, self._cls, {**self._options, **options})

    def remote(self, *args: Any, **more: Any) -> Handle:
        make = functools.partial(self._cls, *args, **more)
        return self._cluster.spawn(str(self._options.get("name", "actor")), make, self._options)


_ray: InMemoryRay | None = None
_start = threading.Thread.start


def _start_of_this_process(thread: threading.Thread) -> None:
    """Start a thread in the process that starts it."""
    process, run = process_here(), thread.run

    def body() -> None:
        with suppress(Killed), process.entered() if process is not None else nullcontext():
            run()

    thread.run = body  # type: ignore[method-assign]
    if process is not None and _ray is not None:
        _ray.threads.append(thread)
    _start(thread)


def _placement_group(bundles: list[dict[str, float]], strategy: str) -> Any:
    return SimpleNamespace(bundle_count=len(bundles), bundle_specs=bundles)


def _call(actor: Actor, method: str, *args: Any) -> Any:
    assert _ray is not None
    process = this_process()
    return _ray.transport(process).call(actor, method, *args)


class InMemoryRay:
    """
    A cluster in this process, active while the context is entered.

    Args:
        nodes: number of nodes; the driver is on the first.
    """

    def __init__(self, nodes: int = 1) -> None:
        self.node_names = tuple(f"{number:056x}" for number in range(nodes))
        self.cluster = LocalCluster()
        self.processes: dict[str, Process] = {}  #: by the actor's name without the job's name
        self._actors: dict[str, Actor] = {}
        self.threads: list[threading.Thread] = []  #: started by its processes
        self._key_values: dict[bytes, bytes] = {}
        self._changing = threading.RLock()
        self._patches = ExitStack()

    def __enter__(self) -> InMemoryRay:
        global _ray
        _ray = self
        for target, replacements in self._replacements():
            for name, value in replacements.items():
                self._patches.enter_context(mock.patch.object(target, name, value))
        return self

    def _replacements(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return the objects to patch, each with its replaced attributes."""
        calls = ("get", "put", "wait", "kill", "remote")
        facts = ("nodes", "get_runtime_context", "is_initialized")
        of_ray = (*calls, *facts, "available_resources", "cluster_resources")
        key_value = ("put_first", "put", "get", "delete", "keys", "delete_all")
        watch = functools.partial(HeadWatch, probe=lambda address: True)
        groups = {"placement_group": _placement_group, "placement_group_table": lambda group: {}}
        return [
            (ray, {name: getattr(self, name) for name in of_ray}),
            (ray.util, {"get_node_ip_address": lambda: "127.0.0.1"}),
            (ray_compat, {name: getattr(self, f"kv_{name}") for name in key_value}),
            (ray_compat, {"free_resources": self.free_resources, "log_as": lambda name: None}),
            (ray_compat, {"submission_id": lambda: None, "stays_on_machine": lambda: False}),
            (spawn, {**groups, "remove_placement_group": lambda group: None}),
            (RayTransport, {"prefetch": lambda *args: None}),  # all objects are in this process
            (hash_seed, {"options": dict}),
            (launch, {"HeadWatch": watch}),
            # Settings of a process would apply to the whole test process.
            (
                training,
                {
                    "log_to_stderr": lambda: None,
                    "os": SimpleNamespace(chdir=lambda to: None),
                    "as_torchrun": lambda place, rendezvous: nullcontext(),
                },
            ),
            (ray_transport, {"log_to_stderr": lambda: None}),
            (torch, {"set_num_threads": lambda count: None}),
            (
                controller_actor,
                {"_send_records": lambda outbox: None},
            ),  # records are in this process
            (ray_groups, {"_register_with_ray": lambda group: None}),  # ranks share one registry
            (threading.Thread, {"start": _start_of_this_process}),
        ]

    def __exit__(self, *error: object) -> None:
        global _ray
        for name in list(self._actors):
            self.kill_process(name)
        self.cluster.close()
        self._wait_for_threads()
        self._patches.close()
        _ray = None

    def _wait_for_threads(self) -> None:
        """Wait until the threads end: a late thread would call real Ray, which is not running."""
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for thread in self.threads:
            if thread.name not in BLOCKING_THREADS and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def as_driver(self, work: Callable[[], Any]) -> Any:
        """Call `work` in the process of the driver; raises `Killed` if the driver is killed."""
        process = self.processes["driver"] = Process("driver", self.node_names[0], None)
        with process.entered():
            return work()

    def alive(self, role: str) -> list[str]:
        """Return the names of live processes that start with `role`."""
        with self._changing:
            alive = [process for process in self.processes.values() if not process.dead.done()]
        return [process.name for process in alive if process.name.startswith(role)]

    def kill_process(self, name: str) -> bool:
        """Kill a process and the actors that it has created; return whether it was alive."""
        with self._changing:
            process = self.processes.get(name)
            if process is None or process.dead.done():
                return False
            owned = [other.name for other in self.processes.values() if other.owner is process]
        actor = self._actors.get(name)
        process.end()
        if actor is not None:
            actor.die("killed")
        for other in owned:
            self.kill_process(other)
        return True

    def spawn(self, name: str, make: Callable[[], Any], options: dict[str, Any]) -> Handle:
        """Create an actor; returns at once."""
        role = name.partition("/")[2] or name
        strategy = options.get("scheduling_strategy")
        with self._changing:
            node = getattr(strategy, "node_id", None) or self._node_of(role)
            process = self.processes[role] = Process(role, node, this_process())

        def failed(why: str) -> None:
            process.end()
            self._actors[role].die(why)

        body = functools.partial(_Body, process, make, failed)
        actor = self._actors[role] = self.cluster.spawn(role, node, lambda transport: None)
        actor.body = body()
        return Handle(actor)

    def _node_of(self, role: str) -> str:
        """Return the node of a role; a replacement has the node of the lost actor."""
        number = re.search(r"\d+", role)
        return self.node_names[int(number[0]) % len(self.node_names) if number else 0]

    def call_actor(self, role: str, method: str, *args: Any) -> Any:
        """
        Call an actor from outside of the cluster.

        Raises:
            TransportError, DistplatError: see `Transport.get`.
        """
        transport = self.cluster.transport(process="outside")
        return transport.get(transport.call(self._actors[role], method, *args), 10.0)

    def transport(self, process: Process) -> Any:
        return self.cluster.transport(process.node, process.name)

    # The methods below have Ray's names and arguments.

    def is_initialized(self) -> bool:
        return True

    def remote(self, cls: type | None = None, **options: Any) -> Any:
        return (lambda cls: _Remote(self, cls, options)) if cls is None else _Remote(self, cls, {})

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        process = this_process()
        if isinstance(reference, _Stored) and reference.owner.dead.done():
            raise exceptions.OwnerDiedError("00", None, "")
        try:
            self._wait_for([reference], 1, timeout)
            answer = self.transport(process).get(reference, 0.0)
        except AnswerPending:
            raise exceptions.GetTimeoutError("no reply in time") from None
        except Unanswered as error:
            raise exceptions.ActorUnavailableError(str(error), None) from None
        except ActorDied as error:
            raise exceptions.RayActorError(error_msg=f"lost\n{error}") from None
        except (DistplatError, TransportError) as error:
            raise exceptions.RayTaskError("a method", "", error) from None
        process.check()
        return answer

    def wait(
        self, references: Sequence[Any], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        done = self._wait_for(references, num_returns, timeout)[:num_returns]
        return done, [ref for ref in references if ref not in done]

    def _wait_for(self, references: Sequence[Any], count: int, timeout: float | None) -> list[Any]:
        process = this_process()
        replies = [ref for ref in references if isinstance(ref, Future)]
        pending = {*replies}
        deadline = None if timeout is None else time.monotonic() + timeout
        while len(replies) - len(pending) < min(count, len(replies)):
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            found = concurrent.futures.wait({*pending, process.dead}, rest, "FIRST_COMPLETED").done
            process.check()
            if not found:
                break
            pending -= found
        return [ref for ref in references if ref not in pending]

    def put(self, value: Any) -> Any:
        return _Stored(value, this_process())

    def kill(self, handle: Handle, no_restart: bool = True) -> None:
        this_process()
        self.kill_process(handle._actor.name)

    def nodes(self) -> list[dict[str, Any]]:
        has = {"Alive": True, "Resources": self.available_resources()}
        return [{"NodeID": node, **has} for node in self.node_names]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 1000.0}

    cluster_resources = available_resources

    def free_resources(self) -> dict[str, dict[str, float]]:
        return {node: self.available_resources() for node in self.node_names}

    def get_runtime_context(self) -> Any:
        process = this_process()
        return SimpleNamespace(
            get_node_id=lambda: process.node,
            get_actor_name=lambda: process.name,
            get_assigned_resources=dict,
            get_accelerator_ids=dict,
            runtime_env={},
            gcs_address="in memory",
        )

    def kv_put_first(self, key: bytes, value: bytes) -> None:
        this_process()
        self._key_values.setdefault(key, value)

    def kv_put(self, key: bytes, value: bytes) -> None:
        this_process()
        self._key_values[key] = value

    def kv_get(self, key: bytes) -> bytes | None:
        this_process()
        return self._key_values.get(key)

    def kv_delete(self, key: bytes) -> None:
        this_process()
        self._key_values.pop(key, None)

    def kv_keys(self, prefix: bytes) -> list[bytes]:
        this_process()
        return [key for key in list(self._key_values) if key.startswith(prefix)]

    def kv_delete_all(self, prefix: bytes) -> None:
        for key in self.kv_keys(prefix):
            self._key_values.pop(key, None)
