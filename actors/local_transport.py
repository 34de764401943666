"""
The transport between threads of one process, with faults on request: no Ray.

    cluster = LocalCluster()
    server = cluster.spawn("server-0", "node-0", partial(ServerNode, "server-0"))
    cluster.inject("push", Fault(lose="reply"), actor="server-0")
    worker = cluster.transport("node-0", "worker-0")
    worker.get(worker.call(server, "push", ...), 5.0)   # Unanswered: the push was made

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
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import override

from distplat.actors.transport import ActorDied, NotHere, Transport, TransportError, Unanswered
from distplat.platform.errors import DistplatError, InfrastructureError


@dataclass(frozen=True)
class Call:
    """A call on its way."""

    process: str
    """Who calls."""
    actor: str
    """Name of who is called."""
    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Fault:
    """What becomes of a call."""

    delay_s: float = 0.0
    """It reaches the actor so much later; later than any deadline: the actor is frozen."""
    reply_delay_s: float = 0.0
    """So much later its answer comes."""
    lose: Literal["", "request", "reply"] = ""
    """Who called is told that no answer came: the call was not carried out, or it was."""
    twice: bool = False
    """It is carried out twice, one after the other; the first answer counts."""
    kill: Literal["", "before", "after"] = ""
    """The actor dies before it is carried out, or before it is answered."""


NO_FAULT = Fault()
Rule = Callable[[Call], Fault | None]
"""Says what becomes of a call; what it raises, the call raises: as if the caller had died."""


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
        """Have a reply told when this actor dies."""
        with self._changing:
            if not self.died:
                self._open.add(reply)
                return
        reply.set_exception(ActorDied(self.died))

    def open_replies(self) -> list[Future[Any]]:
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
        self.packed = _Packed(value)


class LocalCluster:
    """Actors as objects in this process, on nodes that are names."""

    def __init__(self) -> None:
        self._actors: list[Actor] = []
        self._rules: list[Rule] = []

    def transport(self, node: str = "node-0", process: str = "driver") -> LocalTransport:
        """Give a process its way to the actors."""
        return LocalTransport(self, node, process)

    def spawn(self, name: str, node: str, make: Callable[[LocalTransport], object]) -> Actor:
        """Make an actor; `make` is given its way to the others."""
        actor = Actor(name, node)
        self._actors.append(actor)
        actor.body = make(self.transport(node, name))
        return actor

    def add_rule(self, rule: Rule) -> None:
        """Have a rule decide on calls; of several, the first that gives a fault."""
        self._rules.append(rule)

    def inject(
        self,
        method: str,
        fault: Fault,
        *,
        actor: str = "",
        process: str = "",
        after: int = 0,
        times: int = 1,
    ) -> None:
        """
        Inject a fault into some calls.

        Args:
            method: of the calls.
            fault: what becomes of them.
            actor: who is called; empty: anybody.
            process: who calls; the same.
            after: so many of these calls pass before.
            times: so many are hit.
        """
        count = 0
        counting = threading.Lock()

        def rule(call: Call) -> Fault | None:
            nonlocal count
            if call.method != method or call.actor not in (actor or call.actor,):
                return None
            if call.process != (process or call.process):
                return None
            with counting:
                count += 1
                return fault if after < count <= after + times else None

        self.add_rule(rule)

    def fault(self, call: Call) -> Fault:
        """Say what becomes of a call."""
        for rule in self._rules:
            found = rule(call)
            if found is not None:
                return found
        return NO_FAULT

    def death_of(self, process: str) -> str:
        """Say how an actor's process died; empty: it lives, or is no actor's."""
        return next((one.died for one in reversed(self._actors) if one.name == process), "")

    def drain(self, limit_s: float) -> bool:
        """Wait until every call is answered that was made so far; False: some are not in time."""
        open_calls = [reply for actor in self._actors for reply in actor.open_replies()]
        return not concurrent.futures.wait(open_calls, limit_s).not_done

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            actor.die("the run is over")
        self._actors.clear()
        self._rules.clear()


class LocalTransport(Transport):
    """One process's way to the actors; see `Transport`."""

    def __init__(self, cluster: LocalCluster, node: str, process: str) -> None:
        self._cluster, self._node, self._process = cluster, node, process

    @property
    @override
    def node(self) -> str:
        return self._node

    @override
    def call(self, actor: Any, method: str, *args: Any) -> Any:
        """Every call has a thread of its own."""
        fault = self._cluster.fault(Call(self._process, actor.name, method, args))
        reply: Future[Any] = Future()
        if death := self._cluster.death_of(self._process):
            reply.set_exception(ActorDied(death))  # its threads go on here, and reach nobody
            return reply
        actor.expect(reply)
        work = (actor, method, _Packed(args), reply, fault)
        threading.Thread(target=_serve, args=work, daemon=True, name=method).start()
        return reply

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
            raise NotHere
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


def opened(box: list[Any]) -> Any:
    """Give what is in a checkpoint's box: arrays, or where they were put."""
    return box[0].packed.open() if isinstance(box[0], StoredObject) else box


def _serve(actor: Actor, method: str, args: _Packed, reply: Future[Any], fault: Fault) -> None:
    """Carry out a call as its fault says, and answer it."""
    time.sleep(fault.delay_s)
    if fault.lose == "request":
        actor.settle(reply, None, Unanswered("its request got lost"))
        return
    if fault.kill == "before":
        actor.die(f"before {method}")
    answer, error = None, None  # type: Any, Exception | None
    try:
        answer = _Packed(actor.carry_out(method, args.open())).open()
        if fault.twice:
            actor.carry_out(method, args.open())
    except (DistplatError, TransportError) as raised:
        error = raised
    except BaseException as raised:
        text = f"error inside {actor.name}: {type(raised).__name__}: {raised}"
        error = InfrastructureError(text)
        error.__cause__ = raised
    time.sleep(fault.reply_delay_s)
    if fault.kill == "after":
        actor.die(f"after {method}")
    if fault.lose == "reply":
        error = Unanswered("its answer got lost")
    actor.settle(reply, answer, error)


class _Packed:
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
