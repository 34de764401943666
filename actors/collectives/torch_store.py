"""
The store of a torch group, served by rank 0: rendezvous, and heartbeats to find missing ranks.

    rank 0: open a port -> publish the address in Ray's store -> serve the store
    rank r: find the address ->  connect
    all:    set "here/r" in the store -> wait for all ranks -> gloo connects all to all
"""

import math
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import ray

from distplat.actors.collectives.key_value_store import (
    KeyValueStore,
    StoreConnection,
    StoreServer,
    StoreTimeout,
)
from distplat.actors.collectives.rendezvous import (
    GIVEN_UP,
    GroupMember,
    GroupSettings,
    find_address,
    publish_address,
    wait_for,
    withdraw_address,
)
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.disk import run_in_thread
from distplat.platform.errors import CollectiveError, DeadlineExceeded

INTERVAL_S = 0.5
SILENT_S = 4 * INTERVAL_S
"""A rank without a heartbeat for this long is missing."""

_WAIT_SLICE_S = 0.1
"""Length of one wait in the rendezvous; between waits a rank checks whether to abort."""
_MISSING_KEY = "missing"


class _LastBeat(NamedTuple):
    """Last heartbeat of a rank."""

    beats: str
    number: int

    @property
    def left(self) -> bool:
        return self.beats == "left"


class Heartbeat:
    """
    Publishes this rank's heartbeat and number of operations, and finds missing ranks.

    Args:
        store: a client of the group's store.
        rank: in the group.
        world: ranks in the group.
        number: returns the number of operations that this rank has started.
        on_beat: called at each heartbeat.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        number: Callable[[], int],
        on_beat: Callable[[], None],
    ) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._number, self._on_beat = number, on_beat
        self._stopped = threading.Event()
        self._beats = 0
        self._waits_since: float | None = None
        self._last_pause = (-math.inf, 0.0)  #: end and length of this process's last pause
        self.headers: list[str] = []
        """Headers of the failed operation, in rank order, if no rank is missing; empty: some ranks
        have not published theirs."""
        self._publish(str(self._beats))
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the heartbeat, and publish that this rank has left."""
        self._stopped.set()
        # With a deadline: if rank 0 is frozen, a heartbeat may block forever.
        self._thread.join(INTERVAL_S)
        # Breaks reference cycles with the group, so that its sockets close at once.
        self._on_beat, self._number = lambda: None, lambda: 0

    def stood_still_s(self) -> float:
        """Return the length of this process's current or recent pause, stopped or without CPU."""
        now, since = time.monotonic(), self._waits_since
        if since is not None and now - since > SILENT_S:
            return now - since
        ended, length = self._last_pause
        return length if now - ended < 2 * SILENT_S else 0.0

    def find_missing(
        self, number: int, partner: int | None, is_aborted: Callable[[], bool], header: str = ""
    ) -> tuple[int, ...]:
        """
        Find the ranks that made an operation fail; takes two seconds unless another rank has.

        Rank 0 serves the store: if the store does not answer, rank 0 is missing. After a pause of
        this process, its peers may have missed deadlines because of it: then only silent ranks are
        missing.

        Args:
            number: of the failed operation, if all ranks take part in it.
            partner: the other rank, if only two take part.
            is_aborted: whether to stop the search.
            header: of the operation, published to the other ranks; empty: none.
        """
        awake = self.stood_still_s() == 0
        # In a separate thread: if rank 0 is frozen, a request to its store may block forever.
        search = run_in_thread(
            "missing ranks", partial(self._search, number, partner, awake, header)
        )
        deadline = time.monotonic() + 2 * SILENT_S
        while not wait([search], 0.05).done and time.monotonic() < deadline:
            if is_aborted():
                return ()
        return search.result() if search.done() else (0,)

    def _search(
        self, number: int, partner: int | None, awake: bool, header: str
    ) -> tuple[int, ...]:
        try:
            if header:
                self._store.set(f"says/{self._rank}", header)
            missing = self._found_by_others()
            if missing is None:
                missing = self._compare(number, partner, awake)
                if missing:
                    self._store.set(_MISSING_KEY, " ".join(map(str, missing)))
            keys = [f"says/{rank}" for rank in range(self._world)]
            if header and not missing and self._store.check(keys):
                self.headers = [self._store.get(key).decode() for key in keys]
        except (RuntimeError, ValueError):
            return (0,)
        # If the other ranks found this rank missing, it was late, and no other rank is missing.
        return () if self._rank in missing else missing

    def _found_by_others(self) -> tuple[int, ...] | None:
        """Return the missing ranks that another rank has published; None: none has."""
        if not self._store.check([_MISSING_KEY]):
            return None
        return tuple(int(rank) for rank in self._store.get(_MISSING_KEY).decode().split())

    def _compare(self, number: int, partner: int | None, awake: bool) -> tuple[int, ...]:
        before = self._read()
        deadline = time.monotonic() + SILENT_S
        while (remaining := deadline - time.monotonic()) > 0:
            time.sleep(min(remaining, 0.1))
            if (missing := self._found_by_others()) is not None:
                return missing
        after = self._read()
        others = [rank for rank in range(self._world) if rank != self._rank]
        silent = [r for r in others if before[r] == after[r] and not after[r].left]
        if not awake:
            return tuple(silent)
        behind = [r for r in others if after[r].number < number and not after[r].left]
        left = [r for r in others if after[r].left]
        return tuple(silent or ([partner] if partner is not None else behind) or left)

    def _run(self) -> None:
        while not self._wait_for_next_beat():
            self._on_beat()
            self._beats += 1
            if not self._publish(str(self._beats)):
                return  # rank 0 has closed the store and thereby the group
        self._publish("left")

    def _wait_for_next_beat(self) -> bool:
        """Wait for the interval, and record a pause; return whether the heartbeat was stopped."""
        start = self._waits_since = time.monotonic()
        stopped = self._stopped.wait(INTERVAL_S)
        self._waits_since, now = None, time.monotonic()
        if now - start > SILENT_S:
            self._last_pause = now, now - start
        return stopped

    def _publish(self, beats: str) -> bool:
        try:
            self._store.set(f"heartbeat/{self._rank}", f"{beats} {self._number()}")
        except RuntimeError:
            return False
        return True

    def _read(self) -> list[_LastBeat]:
        """Return the last heartbeats of all ranks; zeros for a rank without any."""
        last_beats = []
        for rank in range(self._world):
            key = f"heartbeat/{rank}"
            value = self._store.get(key).decode() if self._store.check([key]) else "0 0"
            beats, number = value.split()
            last_beats.append(_LastBeat(beats, int(number)))
        return last_beats


T = TypeVar("T")

_LINGER_S = 2 * SILENT_S


class Store:
    """
    One rank's connection to the store of its group; rank 0 serves it.

    Args:
        member: the rank and its group.

    Raises:
        DeadlineExceeded: a rank did not join within `rendezvous_s`.
        CollectiveError: `settings.abandoned` was set, or rank 0 is dead.
    """

    def __init__(self, member: GroupMember) -> None:
        self._name, self._rank, self._world = member.name, member.rank, member.world
        self._settings = member.settings
        self._server: StoreServer | None = None
        self.host = _listen_address()
        """Address on which this rank listens."""
        try:
            host, port, secret = self._serve() if self._rank == 0 else self._find()
            # No answer takes longer: a late rank makes the other ranks' operations fail first.
            limit_s = self._settings.rendezvous_s + self._settings.operation_s
            self.client = KeyValueStore(StoreConnection(host, port, secret, limit_s))
            self._wait_for_all()
        except (RuntimeError, OSError) as error:
            cause = f"no answer from rank 0: {str(error).splitlines()[0]}"
            raise CollectiveError(self._name, "rendezvous", 0, (0,), cause) from None
        finally:
            if self._rank == 0:
                withdraw_address(self._name)

    def __del__(self) -> None:
        self.close(after_failure=True)  # the group failed to form

    def close(self, *, after_failure: bool) -> None:
        """
        Stop serving the store.

        Args:
            after_failure: serve a little longer, as other ranks may still search for missing ranks.
        """
        if self._server is not None:
            self._server.close(after_s=_LINGER_S if after_failure else 0.0)
        self._server = None

    def _serve(self) -> tuple[str, int, str]:
        secret = secrets.token_hex(16)  # shared only through Ray's store, which requires a token
        self._server = StoreServer(self.host, secret, self._world)
        publish_address(self._name, f"{self.host} {self._server.port} {secret}".encode())
        return self.host, self._server.port, secret

    def _find(self) -> tuple[str, int, str]:
        host, port, secret = find_address(self._name, self._settings).decode().split()
        return host, int(port), secret

    def _wait_for_all(self) -> None:
        """Wait for all ranks, before gloo waits with the shorter deadline of one operation."""
        self.client.set(f"here/{self._rank}", "")
        keys = [f"here/{rank}" for rank in range(self._world)]

        def complete() -> bytes | None:
            # A wait in the server: polls of a hundred ranks would overload it.
            try:
                self.client.wait(keys, timedelta(seconds=_WAIT_SLICE_S))
            except StoreTimeout:
                return None
            return b""

        def absent() -> tuple[int, ...]:
            return tuple(r for r in range(self._world) if not self.client.check([keys[r]]))

        wait_for(complete, self._name, absent, self._settings)


def run_until_abandoned(connect: Callable[[], T], group_name: str, settings: GroupSettings) -> T:
    """
    Run a step of the rendezvous in a thread, and wait for it until `settings.abandoned` is set.

    If the wait ends early, the thread ends at its own deadlines, or when its peer ends.

    Raises:
        CollectiveError: `settings.abandoned` was set.
        DeadlineExceeded: rank 0, which serves the store, does not answer.
        Exception: raised by `connect`.
    """
    connection = run_in_thread("rendezvous", connect)
    limit = settings.rendezvous_s + settings.operation_s
    clock = AwakeClock()
    while clock.now() < limit and not settings.abandoned.is_set():
        if wait([connection], 0.1).done:
            break
    if wait([connection], 0.1).done:  # the thread checks the event, too, with a better error
        return connection.result()
    if settings.abandoned.is_set():
        raise CollectiveError(group_name, "rendezvous", 0, (), GIVEN_UP)
    what = f"rendezvous of group {group_name!r}"
    raise DeadlineExceeded(what, ("worker-0",), limit, "failure.start_timeout_s")


def _listen_address() -> str:
    """Return the address to listen on: loopback on a one-node cluster, else the node's address."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return "127.0.0.1" if len(alive) == 1 else str(ray.util.get_node_ip_address())
