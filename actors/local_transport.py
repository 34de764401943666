"""
Transport between threads of one process, without Ray.

    cluster = LocalCluster()
    server = cluster.spawn("server-0", "node-0", partial(ServerNode, "server-0"))
    worker = cluster.transport("node-0", "worker-0")
    worker.get(worker.call(server, "push", ...), 5.0)

Clients and servers are the real classes. Arguments and answers are pickled, so that objects are
shared only as between two processes. Shared memory works as on one node: all threads map the same
segments.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import io
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from typing_extensions import override

from distplat.actors.transport import ActorDied, AnswerPending, Transport, TransportError
from distplat.platform.errors import DistplatError, InfrastructureError


class Actor:
    """
    An actor's handle.

    Args:
        name: name of the actor.
        node: node of the actor.
    """

    def __init__(self, name: str, node: str) -> None:
        self.name, self.node = name, node
        self.body: Any = None  #: the object itself
        self.died = ""  #: cause of death; empty: alive
        self._open: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def die(self, cause: str) -> None:
        """End the actor: call the object's `close`, if any, and fail all open calls."""
        with self._lock:
            if self.died:
                return
            self.died = f"{self.name} died: {cause}"
            left, self._open = self._open, set()
        close = getattr(self.body, "close", None)
        if close is not None:
            close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        for reply in left:
            reply.set_exception(ActorDied(self.died))

    def expect(self, reply: Future[Any]) -> None:
        """Register a reply, which fails if this actor dies."""
        with self._lock:
            if not self.died:
                self._open.add(reply)
                return
        reply.set_exception(ActorDied(self.died))

    def open_calls(self) -> list[Future[Any]]:
        """Return the replies of unanswered calls."""
        with self._lock:
            return list(self._open)

    def resolve(self, reply: Future[Any], answer: Any, error: BaseException | None = None) -> None:
        """Set the result or exception of a reply, unless it is already done."""
        with self._lock:
            if reply not in self._open:
                return
            self._open.remove(reply)
        if error is None:
            reply.set_result(answer)
        else:
            reply.set_exception(error)

    def carry_out(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call a method of the object; coroutines run on the actor's own event loop."""
        if self.died:
            raise ActorDied(self.died)
        bound = getattr(self.body, method)
        if not inspect.iscoroutinefunction(bound):
            return bound(*args)
        return asyncio.run_coroutine_threadsafe(bound(*args), self._running_loop()).result()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, daemon=True).start()
            return self._loop


class StoredObject:
    """A reference returned by `put`."""

    def __init__(self, value: Any) -> None:
        self.packed = Packed(value)


class LocalCluster:
    """Actors as objects of this process; nodes are just names."""

    def __init__(self) -> None:
        self._actors: list[Actor] = []
        self.deliver = self._deliver  #: executes calls; tests replace it to inject faults

    def transport(self, node: str = "node-0", process: str = "driver") -> LocalTransport:
        """Create the transport of a process."""
        return LocalTransport(self, node, process)

    def spawn(self, name: str, node: str, create: Callable[[LocalTransport], object]) -> Actor:
        """Create an actor; `create` gets the actor's transport and returns the object."""
        actor = Actor(name, node)
        self._actors.append(actor)
        actor.body = create(LocalTransport(self, node, name, actor))
        return actor

    def _deliver(
        self, process: str, actor: Actor, method: str, args: tuple[Any, ...]
    ) -> Future[Any]:
        """Execute a call on a new thread."""
        reply: Future[Any] = Future()
        if death := self.death_of(process):
            reply.set_exception(ActorDied(death))  # threads of a dead process keep running here
            return reply
        actor.expect(reply)
        work = (actor, method, Packed(args), reply)
        threading.Thread(target=_serve, args=work, daemon=True, name=method).start()
        return reply

    def death_of(self, process: str) -> str:
        """Return the cause of death of an actor's process; empty: alive, or not an actor's."""
        actors = reversed(self._actors)
        return next((actor.died for actor in actors if actor.name == process), "")

    def open_calls(self) -> list[Future[Any]]:
        """Return the replies of unanswered calls of all actors."""
        return [reply for actor in self._actors for reply in actor.open_calls()]

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            actor.die("the run is over")
        self._actors.clear()


class LocalTransport(Transport):
    """Transport of one process; see `Transport`."""

    def __init__(
        self, cluster: LocalCluster, node: str, process: str, owner: Actor | None = None
    ) -> None:
        self._cluster, self._node, self._process = cluster, node, process
        self._owner = owner  #: actor of the process; a later actor may reuse its name

    @property
    @override
    def node(self) -> str:
        return self._node

    @override
    def call(self, actor: Any, method: str, *args: Any) -> Any:
        if self._owner is not None and self._owner.died:
            reply: Future[Any] = Future()
            reply.set_exception(ActorDied(self._owner.died))
            return reply
        return self._cluster.deliver(self._process, actor, method, args)

    @override
    def wait(
        self, replies: Sequence[Any], timeout_s: float, *, everything: bool = False
    ) -> list[Any]:
        when = "ALL_COMPLETED" if everything else "FIRST_COMPLETED"
        done = concurrent.futures.wait(replies, timeout_s, when).done
        return [reply for reply in replies if reply in done]

    @override
    def get(self, reference: Any, timeout_s: float) -> Any:
        if isinstance(reference, StoredObject):
            return reference.packed.open()
        if not self.wait([reference], timeout_s):
            raise AnswerPending
        return reference.result()

    @override
    def put(self, value: Any) -> Any:
        return StoredObject(value)

    @override
    def prefetch(self, reply: Any, find: Callable[[Any], Any]) -> None:
        """Do nothing: all objects are local."""

    @override
    def kill(self, actor: Any) -> None:
        actor.die("killed")


def fetch_arrays(ref: list[Any]) -> Any:
    """Return the arrays of a checkpoint reference: an object of `put`, or the arrays themselves."""
    return ref[0].packed.open() if isinstance(ref[0], StoredObject) else ref


def _serve(actor: Actor, method: str, args: Packed, reply: Future[Any]) -> None:
    actor.resolve(reply, *outcome(actor, method, args))


def outcome(actor: Actor, method: str, args: Packed) -> tuple[Any, Exception | None]:
    """Execute a call of an actor; return its answer and its error, one of which is None."""
    try:
        return Packed(actor.carry_out(method, args.open())).open(), None
    except (DistplatError, TransportError) as error:
        return None, error
    except BaseException as error:
        wrapped = InfrastructureError(f"error inside {actor.name}: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        return None, wrapped


class Packed:
    """A pickled value; handles, replies and references in it are shared instead of copied."""

    def __init__(self, value: Any) -> None:
        self.shared: list[Any] = []
        stream = io.BytesIO()
        pickler = _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.shared = self.shared
        pickler.dump(value)
        self.data = stream.getvalue()

    def open(self) -> Any:
        """Return a new copy of the value."""
        unpickler = _Unpickler(io.BytesIO(self.data))
        unpickler.shared = self.shared
        return unpickler.load()


class _Pickler(pickle.Pickler):
    shared: list[Any]

    @override
    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Actor | StoredObject | Future):
            return None
        self.shared.append(obj)
        return len(self.shared) - 1


class _Unpickler(pickle.Unpickler):
    shared: list[Any]

    @override
    def persistent_load(self, pid: Any) -> Any:
        return self.shared[pid]
