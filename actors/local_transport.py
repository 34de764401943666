"""
The transport between threads of one process: no Ray.

    cluster = LocalCluster()
    server = cluster.spawn("server-0", "node-0", partial(ServerNode, "server-0"))
    worker = cluster.transport("node-0", "worker-0")
    worker.get(worker.call(server, "push", ...), 5.0)

Clients and servers are the real ones. What travels is pickled, so that nothing is shared that two
processes would not share. Memory is: threads of two processes on one node map the same segments.
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
        name: for messages and rules.
        node: on which it is.
    """

    def __init__(self, name: str, node: str) -> None:
        self.name, self.node = name, node
        self.body: Any = None  #: the object itself, for tests that look into it
        self.died = ""  #: how; empty: it lives
        self._open: set[Future[Any]] = set()
        self._changing = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def die(self, cause: str) -> None:
        """End: no call is answered any more. A method `close` of the object is called."""
        with self._changing:
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
        """Make a reply fail if this actor dies."""
        with self._changing:
            if not self.died:
                self._open.add(reply)
                return
        reply.set_exception(ActorDied(self.died))

    def open_calls(self) -> list[Future[Any]]:
        """Give the calls that are not answered yet."""
        with self._changing:
            return list(self._open)

    def settle(self, reply: Future[Any], answer: Any, error: BaseException | None = None) -> None:
        """Answer, unless that was done."""
        with self._changing:
            if reply not in self._open:
                return
            self._open.remove(reply)
        if error is None:
            reply.set_result(answer)
        else:
            reply.set_exception(error)

    def carry_out(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call the object; coroutines run on a loop of the actor's, one at a time."""
        if self.died:
            raise ActorDied(self.died)
        bound = getattr(self.body, method)
        if not inspect.iscoroutinefunction(bound):
            return bound(*args)
        return asyncio.run_coroutine_threadsafe(bound(*args), self._running_loop()).result()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._changing:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, daemon=True).start()
            return self._loop


class StoredObject:
    """An object that was put."""

    def __init__(self, value: Any) -> None:
        self.packed = Packed(value)


class LocalCluster:
    """Actors as objects in this process, on nodes that are names."""

    def __init__(self) -> None:
        self._actors: list[Actor] = []
        self.deliver = self._deliver  #: carries calls out; a test puts faults in between

    def transport(self, node: str = "node-0", process: str = "driver") -> LocalTransport:
        """Give a process its way to the actors."""
        return LocalTransport(self, node, process)

    def spawn(self, name: str, node: str, make: Callable[[LocalTransport], object]) -> Actor:
        """Make an actor; `make` is given its way to the others."""
        actor = Actor(name, node)
        self._actors.append(actor)
        actor.body = make(LocalTransport(self, node, name, actor))
        return actor

    def _deliver(
        self, process: str, actor: Actor, method: str, args: tuple[Any, ...]
    ) -> Future[Any]:
        """Every call has a thread of its own."""
        reply: Future[Any] = Future()
        if death := self.death_of(process):
            reply.set_exception(ActorDied(death))  # its threads go on here, and reach nobody
            return reply
        actor.expect(reply)
        work = (actor, method, Packed(args), reply)
        threading.Thread(target=_serve, args=work, daemon=True, name=method).start()
        return reply

    def death_of(self, process: str) -> str:
        """Say how an actor's process died; empty: it lives, or is no actor's."""
        return next((one.died for one in reversed(self._actors) if one.name == process), "")

    def open_calls(self) -> list[Future[Any]]:
        """Give the calls that are not answered yet."""
        return [reply for actor in self._actors for reply in actor.open_calls()]

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            actor.die("the run is over")
        self._actors.clear()


class LocalTransport(Transport):
    """One process's way to the actors; see `Transport`."""

    def __init__(
        self, cluster: LocalCluster, node: str, process: str, owner: Actor | None = None
    ) -> None:
        self._cluster, self._node, self._process = cluster, node, process
        self._owner = owner  #: the process's actor; another one may have its name later

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
        """Here every object is everywhere."""

    @override
    def kill(self, actor: Any) -> None:
        actor.die("killed")


def fetch_arrays(ref: list[Any]) -> Any:
    """Give the arrays that a checkpoint refers to: themselves, or what was put into the store."""
    return ref[0].packed.open() if isinstance(ref[0], StoredObject) else ref


def _serve(actor: Actor, method: str, args: Packed, reply: Future[Any]) -> None:
    actor.settle(reply, *outcome(actor, method, args))


def outcome(actor: Actor, method: str, args: Packed) -> tuple[Any, Exception | None]:
    """Have an actor carry out a call; give its answer, or what comes in the place of one."""
    try:
        return Packed(actor.carry_out(method, args.open())).open(), None
    except (DistplatError, TransportError) as error:
        return None, error
    except BaseException as error:
        wrapped = InfrastructureError(f"error inside {actor.name}: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        return None, wrapped


class Packed:
    """A copy of a value as it travels; handles, replies and references in it are not copied."""

    def __init__(self, value: Any) -> None:
        self.kept: list[Any] = []
        stream = io.BytesIO()
        pickler = _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.kept = self.kept
        pickler.dump(value)
        self.data = stream.getvalue()

    def open(self) -> Any:
        """Give another copy."""
        unpickler = _Unpickler(io.BytesIO(self.data))
        unpickler.kept = self.kept
        return unpickler.load()


class _Pickler(pickle.Pickler):
    kept: list[Any]

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Actor | StoredObject | Future):
            return None
        self.kept.append(obj)
        return len(self.kept) - 1


class _Unpickler(pickle.Unpickler):
    kept: list[Any]

    def persistent_load(self, pid: Any) -> Any:
        return self.kept[pid]
