"""
The store of a torch group: rank 0 serves it, all connect to it, and through it to each other.

    rank 0: open a port -> leave the address with Ray -> serve the store
    rank r: find the address ->  connect
    all:    "here/r" in the store -> wait until everybody is here -> gloo connects all to all
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
"""A rank without a heartbeat for so long is missing."""

_WAIT_SLICE_S = 0.1
"""Seconds of one wait in the rendezvous; in between a rank sees whether it is to give up."""
_FOUND = "missing"


class _LastBeat(NamedTuple):
    """The last one of a rank."""

    beats: str
    number: int

    @property
    def left(self) -> bool:
        return self.beats == "left"


class Heartbeat:
    """
    Publishes that this rank lives and how far it is; finds the ranks that do not.

    Args:
        store: a client of the group's store.
        rank: in the group.
        world: ranks in the group.
        number: gives the operations that this rank has begun.
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
        self._absence = (-math.inf, 0.0)  #: when it ended, and how long it was
        self.said: list[str] = []
        """What each rank has said of the operation that failed, where nobody is missing, in rank
        order; empty: some have not."""
        self._publish(str(self._beats))
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish no more, and that it is on purpose."""
        self._stopped.set()
        # Not for long: where rank 0 is frozen, a beat may be on its way for ever.
        self._thread.join(INTERVAL_S)
        # They lead back to the group: without the circle its sockets close as soon as it goes.
        self._on_beat, self._number = lambda: None, lambda: 0

    def stood_still_s(self) -> float:
        """Say how long this process was stopped, or had no processor, just now; 0: it was not."""
        now, since = time.monotonic(), self._waits_since
        if since is not None and now - since > SILENT_S:
            return now - since
        ended, length = self._absence
        return length if now - ended < 2 * SILENT_S else 0.0

    def missing(
        self, number: int, partner: int | None, gave_up: Callable[[], bool], says: str = ""
    ) -> tuple[int, ...]:
        """
        Find the ranks that made an operation fail; takes two seconds if no other rank has.

        Rank 0 keeps the store: if that does not answer, rank 0 is missing. If this process stood
        still, deadlines of its peers are over because of itself: only who is silent is missing.

        Args:
            number: the operation that failed, if all ranks take part in it.
            partner: the other rank, if only two do.
            gave_up: whether nobody wants the answer any more.
            says: what the others are told of the operation; empty: nothing.
        """
        awake = self.stood_still_s() == 0
        # In a thread of its own: a frozen rank 0 leaves a question to its store open for ever.
        look = run_in_thread("missing ranks", partial(self._search, number, partner, awake, says))
        deadline = time.monotonic() + 2 * SILENT_S
        while not wait([look], 0.05).done and time.monotonic() < deadline:
            if gave_up():
                return ()
        return look.result() if look.done() else (0,)

    def _search(self, number: int, partner: int | None, awake: bool, says: str) -> tuple[int, ...]:
        try:
            if says:
                self._store.set(f"says/{self._rank}", says)
            missing = self._found_by_others()
            if missing is None:
                missing = self._compare(number, partner, awake)
                if missing:
                    self._store.set(_FOUND, " ".join(map(str, missing)))
            keys = [f"says/{rank}" for rank in range(self._world)]
            if says and not missing and self._store.check(keys):
                self.said = [self._store.get(key).decode() for key in keys]
        except (RuntimeError, ValueError):
            return (0,)
        # The others gave up on this rank; it came late, and misses nobody.
        return () if self._rank in missing else missing

    def _found_by_others(self) -> tuple[int, ...] | None:
        """Give what another rank found out."""
        if not self._store.check([_FOUND]):
            return None
        return tuple(int(rank) for rank in self._store.get(_FOUND).decode().split())

    def _compare(self, number: int, partner: int | None, awake: bool) -> tuple[int, ...]:
        before = self._read()
        deadline = time.monotonic() + SILENT_S
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
            if (found := self._found_by_others()) is not None:
                return found
        after = self._read()
        others = [rank for rank in range(self._world) if rank != self._rank]
        silent = [r for r in others if before[r] == after[r] and not after[r].left]
        if not awake:
            return tuple(silent)
        late = [r for r in others if after[r].number < number and not after[r].left]
        left_us = [r for r in others if after[r].left]
        return tuple(silent or ([partner] if partner is not None else late) or left_us)

    def _run(self) -> None:
        while not self._wait_for_next_beat():
            self._on_beat()
            self._beats += 1
            if not self._publish(str(self._beats)):
                return  # rank 0 has closed the store: the group is over
        self._publish("left")

    def _wait_for_next_beat(self) -> bool:
        """Wait until the next beat; say whether there is to be none."""
        began = self._waits_since = time.monotonic()
        over = self._stopped.wait(INTERVAL_S)
        self._waits_since, now = None, time.monotonic()
        if now - began > SILENT_S:
            self._absence = now, now - began
        return over

    def _publish(self, beats: str) -> bool:
        try:
            self._store.set(f"heartbeat/{self._rank}", f"{beats} {self._number()}")
        except RuntimeError:
            return False
        return True

    def _read(self) -> list[_LastBeat]:
        """Give every rank's heartbeat; no beats and no operations for one that never came."""
        beats_of = []
        for rank in range(self._world):
            key = f"heartbeat/{rank}"
            value = self._store.get(key).decode() if self._store.check([key]) else "0 0"
            beats, number = value.split()
            beats_of.append(_LastBeat(beats, int(number)))
        return beats_of


T = TypeVar("T")

_LINGER_S = 2 * SILENT_S


class Store:
    """
    One rank's connection to the store of its group; rank 0 serves it.

    Args:
        member: which rank, of which group.

    Raises:
        DeadlineExceeded: somebody did not come in `rendezvous_s`.
        CollectiveError: this rank was told to give up, or rank 0 is gone.
    """

    def __init__(self, member: GroupMember) -> None:
        self._name, self._rank, self._world = member.name, member.rank, member.world
        self._settings = member.settings
        self._server: StoreServer | None = None
        self.host = _listen_address()
        """Address that this rank listens on."""
        try:
            host, port, secret = self._serve() if self._rank == 0 else self._find()
            # Nobody is waited for longer in here: who is late makes the others' operations fail.
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
        self.close(troubled=True)  # the group came to nothing

    def close(self, *, troubled: bool) -> None:
        """
        Serve no more.

        Args:
            troubled: the group broke; the others may still be asking whose fault it is.
        """
        if self._server is not None:
            self._server.close(after_s=_LINGER_S if troubled else 0.0)
        self._server = None

    def _serve(self) -> tuple[str, int, str]:
        secret = secrets.token_hex(16)  # goes through Ray's store alone, which asks for a token
        self._server = StoreServer(self.host, secret, self._world)
        publish_address(self._name, f"{self.host} {self._server.port} {secret}".encode())
        return self.host, self._server.port, secret

    def _find(self) -> tuple[str, int, str]:
        host, port, secret = find_address(self._name, self._settings).decode().split()
        return host, int(port), secret

    def _wait_for_all(self) -> None:
        """Wait for all ranks before gloo does, whose deadline is that of one operation."""
        self.client.set(f"here/{self._rank}", "")
        everybody = [f"here/{rank}" for rank in range(self._world)]

        def complete() -> bytes | None:
            # The server tells: a hundred ranks that ask again and again keep it from answering.
            try:
                self.client.wait(everybody, timedelta(seconds=_WAIT_SLICE_S))
            except StoreTimeout:
                return None
            return b""

        def absent() -> tuple[int, ...]:
            return tuple(r for r in range(self._world) if not self.client.check([everybody[r]]))

        wait_for(complete, self._name, absent, self._settings)


def run_unless_given_up(make: Callable[[], T], group_name: str, settings: GroupSettings) -> T:
    """
    Run what may take long in a thread, and wait for it only as long as it is wanted.

    A thread that is left behind ends at its own deadlines, or with the peer that holds it up.

    Raises:
        CollectiveError: this rank was told to give up.
        DeadlineExceeded: rank 0, which serves the store, does not answer.
        Exception: what `make` raised.
    """
    store = run_in_thread("rendezvous", make)
    limit = settings.rendezvous_s + settings.operation_s
    clock = AwakeClock()
    while clock.now() < limit and not settings.abandoned.is_set():
        if wait([store], 0.1).done:
            break
    if wait([store], 0.1).done:  # it looks at the event itself, and has the better error
        return store.result()
    if settings.abandoned.is_set():
        raise CollectiveError(group_name, "rendezvous", 0, (), GIVEN_UP)
    what = f"rendezvous of group {group_name!r}"
    raise DeadlineExceeded(what, ("worker-0",), limit, "failure.start_timeout_s")


def _listen_address() -> str:
    """Address to listen on: loopback where the cluster is one node, else this node's own."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return "127.0.0.1" if len(alive) == 1 else str(ray.util.get_node_ip_address())
