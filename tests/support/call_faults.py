"""
Fault injection for calls over `LocalTransport`: delays, losses, duplicates, and actor deaths.

    inject(cluster, "push", Fault(lose="reply"), actor="server-0")
    worker.get(worker.call(server, "push", ...), 5.0)   # Unanswered: the push was executed
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from distplat.actors.local_transport import Actor, LocalCluster, Packed, outcome
from distplat.actors.transport import Unanswered


@dataclass(frozen=True)
class Call:
    """A call in flight."""

    process: str
    """Name of the calling process."""
    actor: str
    """Name of the called actor."""
    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Fault:
    """Fault of a call."""

    delay_s: float = 0.0
    """Delay of the request; a delay beyond all deadlines simulates a frozen actor."""
    reply_delay_s: float = 0.0
    """Delay of the reply."""
    lose: Literal["", "request", "reply"] = ""
    """Lost message; the caller gets `Unanswered`. With `reply` the call was executed."""
    twice: bool = False
    """Execute the call twice in sequence; the first answer is returned."""
    kill: Literal["", "before", "after"] = ""
    """Kill the actor before the call is executed, or before it is answered."""
    then: Callable[[], object] | None = None
    """Called after the call is executed, before it is answered."""


NO_FAULT = Fault()
Rule = Callable[[Call], Fault | None]
"""Returns the fault of a call, or raises the error that the caller gets."""


class _FaultyDelivery:
    """Delivers the calls of a cluster with faults; the first rule that returns a fault applies."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.rules: list[Rule] = []
        self._cluster, self._deliver = cluster, cluster.deliver

    def __call__(
        self, process: str, actor: Actor, method: str, args: tuple[Any, ...]
    ) -> Future[Any]:
        call = Call(process, actor.name, method, args)
        faults = (rule(call) for rule in self.rules)
        fault = next((fault for fault in faults if fault is not None), NO_FAULT)
        if fault is NO_FAULT or self._cluster.death_of(process):
            return self._deliver(process, actor, method, args)
        reply: Future[Any] = Future()
        actor.expect(reply)
        serve_args = (actor, method, Packed(args), reply, fault)
        threading.Thread(target=_serve, args=serve_args, daemon=True, name=method).start()
        return reply


def _serve(actor: Actor, method: str, args: Packed, reply: Future[Any], fault: Fault) -> None:
    """Execute a call with its fault, and answer it."""
    time.sleep(fault.delay_s)
    if fault.lose == "request":
        actor.resolve(reply, None, Unanswered("its request got lost"))
        return
    if fault.kill == "before":
        actor.die(f"before {method}")
    answer, error = outcome(actor, method, args)
    if fault.twice and error is None:
        _, error = outcome(actor, method, args)
    if fault.then is not None:
        fault.then()
    time.sleep(fault.reply_delay_s)
    if fault.kill == "after":
        actor.die(f"after {method}")
    if fault.lose == "reply":
        error = Unanswered("its answer got lost")
    actor.resolve(reply, answer, error)


def add_rule(cluster: LocalCluster, rule: Rule) -> None:
    """Add a rule for a cluster's calls, after its existing rules."""
    delivery = cluster.deliver
    if not isinstance(delivery, _FaultyDelivery):
        delivery = cluster.deliver = _FaultyDelivery(cluster)
    delivery.rules.append(rule)


def inject(
    cluster: LocalCluster,
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
        cluster: cluster of the actors.
        method: name of the method.
        fault: the fault.
        actor: name of the called actor; empty: any.
        process: name of the calling process; empty: any.
        after: number of matching calls to pass first.
        times: number of calls with the fault.
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

    add_rule(cluster, rule)


def drain(cluster: LocalCluster, limit_s: float) -> bool:
    """Wait for the answers of all calls made so far; return whether all came in time."""
    return not concurrent.futures.wait(cluster.open_calls(), limit_s).not_done
