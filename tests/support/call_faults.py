"""
Faults of calls over `LocalTransport`: delayed, lost, carried out twice, or with the actor's death.

    inject(cluster, "push", Fault(lose="reply"), actor="server-0")
    worker.get(worker.call(server, "push", ...), 5.0)   # Unanswered: the push was made
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
    then: Callable[[], object] | None = None
    """Is called when it was carried out, before it is answered."""


NO_FAULT = Fault()
Rule = Callable[[Call], Fault | None]
"""Says what becomes of a call; what it raises, the call raises: as if the caller had died."""


class _Disturbed:
    """Carries out the calls of a cluster as rules say: of several, the first that gives a fault."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.rules: list[Rule] = []
        self._cluster, self._deliver = cluster, cluster.deliver

    def __call__(
        self, process: str, actor: Actor, method: str, args: tuple[Any, ...]
    ) -> Future[Any]:
        call = Call(process, actor.name, method, args)
        faults = (rule(call) for rule in self.rules)
        fault = next((one for one in faults if one is not None), NO_FAULT)
        if fault is NO_FAULT or self._cluster.death_of(process):
            return self._deliver(process, actor, method, args)
        reply: Future[Any] = Future()
        actor.expect(reply)
        work = (actor, method, Packed(args), reply, fault)
        threading.Thread(target=_serve, args=work, daemon=True, name=method).start()
        return reply


def _serve(actor: Actor, method: str, args: Packed, reply: Future[Any], fault: Fault) -> None:
    """Carry out a call as its fault says, and answer it."""
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
    """Have a rule decide on a cluster's calls, after those that it has."""
    disturbed = cluster.deliver
    if not isinstance(disturbed, _Disturbed):
        disturbed = cluster.deliver = _Disturbed(cluster)
    disturbed.rules.append(rule)


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
        cluster: whose.
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

    add_rule(cluster, rule)


def drain(cluster: LocalCluster, limit_s: float) -> bool:
    """Wait until every call is answered that was made so far; False: some are not in time."""
    return not concurrent.futures.wait(cluster.open_calls(), limit_s).not_done
