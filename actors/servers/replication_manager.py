"""
Replication of a server group: executes the orders of `ServerGroup`.

    watch thread    an open poll to every server; events ──▶ ServerGroup ──▶ orders
    order threads   create, fill or drop a backup, promote; each ends with an event

`platform/server_group.py` decides. Only the watch thread uses it, so events go through a queue.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from distplat.actors.messages import MemoryAddress
from distplat.actors.retrying_calls import ask
from distplat.actors.servers.health_check import TICK_S, Heartbeats
from distplat.actors.transport import Transport, TransportError
from distplat.platform.errors import ActorLost, DistplatError, NotReadyError
from distplat.platform.server_group import (
    DropBackup,
    Fill,
    MakeBackup,
    Order,
    Promote,
    ServerGroup,
    ShardAssignment,
)
from distplat.platform.spec import Failure

logger = logging.getLogger(__name__)

_FOR_GOOD = "no other server has its data: its backup was not complete yet"
_ANSWER_GRACE_S = 10.0
"""Added to a primary's own deadline, so that the primary's error, which says more, comes first."""

MakeServer = Callable[[str, str], Any]
"""Creates a server node, by name, preferably not on the given node; returns its handle."""
Assign = Callable[[Any, int], Any]
"""Assigns a shard to a backup; waits until the first worker has described the model."""


class ReplicationManager:
    """
    Watch a group of servers, promote backups and replace lost servers.

    Args:
        transport: the manager's.
        group: servers of each shard.
        handles: of its servers, by name.
        limits: the job's deadlines.
        make: see `MakeServer`.
        assign: see `Assign`.
        losing: set once `lost` is set.
    """

    def __init__(
        self,
        transport: Transport,
        group: ServerGroup,
        handles: dict[str, Any],
        limits: Failure,
        make: MakeServer,
        assign: Assign,
        losing: threading.Event,
    ) -> None:
        self._transport, self._limits, self._losing = transport, limits, losing
        self._make, self._assign = make, assign
        self._group, self.handles = group, dict(handles)
        self._heartbeats = Heartbeats(transport, limits.heartbeat_timeout_s)
        self._addresses: dict[str, MemoryAddress | None] = {}  #: of promoted servers' parameters
        self._events: queue.SimpleQueue[Callable[[], list[Order]]] = queue.SimpleQueue()
        self._promotions: dict[str, threading.Event] = {}  #: by server; set when the order ends
        self._map = group.version, [assignment.primary for assignment in group.assignments]
        self._changed = threading.Condition()
        self.lost: DistplatError | None = None  #: why the group cannot continue
        self._closed = False
        threading.Thread(target=self._run, name="replication", daemon=True).start()

    def primaries(self) -> tuple[int, list[str]]:
        """Return the map's version, and the primary of each shard."""
        with self._changed:
            return self._map

    def assignments(self) -> list[ShardAssignment]:
        """Return the servers of each shard."""
        return [replace(assignment) for assignment in self._group.assignments]

    def address(self, server: str) -> MemoryAddress | None:
        """Return the address of a promoted server's parameters; None: it was not promoted."""
        return self._addresses.get(server)

    def wait_past(self, version: int, limit_s: float) -> bool:
        """Wait for a map newer than `version`, or for `lost`; return whether either came."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._is_news(version), limit_s)
            return self._is_news(version)

    def _is_news(self, version: int) -> bool:
        return self._map[0] > version or self.lost is not None

    def close(self) -> None:
        """Stop watching the servers, and end waits for newer maps."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        """Watch the servers until a shard is lost or the manager is closed."""
        lost: DistplatError | None = None
        try:
            self._handle_events()
            if self._group.broken is not None:
                lost = ActorLost(self._group.broken, None, _FOR_GOOD)
        except BaseException as error:
            logger.exception("the replication thread ended")
            lost = ActorLost("server-manager", None, f"its replication thread ended: {error!r}")
        with self._changed:
            self.lost = lost
            self._changed.notify_all()
        if lost is not None:
            self._losing.set()

    def _handle_events(self) -> None:
        self._start_orders(self._group.start_backups())
        while self._group.broken is None and not self._closed:
            try:
                event = self._events.get(timeout=TICK_S)
            except queue.Empty:
                self._watch()
            else:
                self._start_orders(event())

    def _start_orders(self, orders: list[Order]) -> None:
        for order in orders:
            logger.info("%s", order)
            if isinstance(order, Promote):
                self._promotions[order.server] = threading.Event()
            threading.Thread(target=self._execute, args=(order,), daemon=True).start()

    def _execute(self, order: Order) -> None:
        action: Callable[[], Callable[[], list[Order]]]
        match order:
            case MakeBackup(server=suspect):
                action = partial(self._make_backup, order)
            case Fill(backup=suspect):
                action = partial(self._fill, order)
            case Promote(server=suspect):
                action = partial(self._promote, order)
            case DropBackup(server=suspect):
                action = partial(self._drop_backup, order)
        try:
            self._events.put(action())
        except Exception as error:  # also unexpected errors: the order has failed either way
            if self._closed:
                return
            expected = isinstance(error, DistplatError | TransportError)
            logger.warning("%s failed: %s", order, error, exc_info=not expected)
            self._events.put(partial(self._on_lost, suspect))
        finally:
            if isinstance(order, Promote):
                self._promotions[order.server].set()

    def _wait_for_promotion(self, server: str) -> None:
        """Wait until a server's promotion has ended, if one was ordered."""
        if (promotion := self._promotions.get(server)) is not None:
            promotion.wait()  # a promotion has a deadline

    def _make_backup(self, order: MakeBackup) -> Callable[[], list[Order]]:
        beside = self._ask(order.beside, "where", "where")
        handle = self._make(order.server, beside)
        self.handles[order.server] = handle
        self._assign(handle, order.shard)
        return partial(self._group.backup_started, order.server)

    def _fill(self, order: Fill) -> Callable[[], list[Order]]:
        self._wait_for_promotion(order.primary)
        backup = order.term, order.backup, self.handles[order.backup]
        until = time.monotonic() + self._limits.start_timeout_s
        while True:
            try:
                self._ask(order.primary, "filling a backup", "replicate_to", *backup)
                break
            except NotReadyError:  # the primary has no parameters yet
                if time.monotonic() > until:
                    raise
                time.sleep(TICK_S)

        def ready() -> list[Order]:
            self._group.backup_filled(order.backup, order.term)
            return []

        return ready

    def _promote(self, order: Promote) -> Callable[[], list[Order]]:
        address = self._ask(order.server, "promotion", "promote", order.term)

        def announce() -> list[Order]:
            with self._changed:
                self._addresses[order.server] = address
                servers = list(self._map[1])
                servers[order.shard] = order.server
                self._map = self._map[0] + 1, servers
                self._changed.notify_all()
            return []

        return announce

    def _drop_backup(self, order: DropBackup) -> Callable[[], list[Order]]:
        self._wait_for_promotion(order.server)
        self._ask(order.server, "going on alone", "alone", order.term)
        return list

    def _ask(self, server: str, what: str, method: str, *args: Any) -> Any:
        call = partial(self._transport.call, self.handles[server], method, *args)
        limit = self._limits.step_timeout_s + _ANSWER_GRACE_S
        return ask(self._transport, what, {server: call}, limit, "step_timeout_s")[0]

    def _watch(self) -> None:
        """Detect lost servers; a server that has never answered is starting and may be silent."""
        handles = {name: self.handles[name] for name in self._group.servers if name in self.handles}
        starting = [name for name in handles if not self._heartbeats.has_answered(name)]
        for name, cause in self._heartbeats.find_lost(handles, starting).items():
            if self._closed:  # the run has ended, and its servers end, too
                return
            logger.warning("%s: %s", name, cause)
            self._start_orders(self._on_lost(name))

    def _on_lost(self, name: str) -> list[Order]:
        if self._closed:  # the run has ended, and its servers end, too
            return []
        orders = self._group.server_lost(name)
        handle = self.handles.get(name)
        if handle is not None:
            logger.warning("%s is lost", name)
            self._transport.kill(handle)  # the process may be frozen, not dead
        return orders
