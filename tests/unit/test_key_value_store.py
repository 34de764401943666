"""The store of a torch group: what torch's own do, for ranks alone."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed
from rank_threads import on_ranks

from distplat.actors.collectives import key_value_store
from distplat.actors.collectives.key_value_store import KeyValueStore, StoreConnection, StoreServer
from distplat.strategies import torch_compat
from distplat.strategies.collective import ReduceOp

dist: Any = torch.distributed
HOST, SECRET, LIMIT_S = "127.0.0.1", "0123456789abcdef", 10.0
NONCE, PROOF = key_value_store._NONCE_BYTES, key_value_store._PROOF_BYTES


@pytest.fixture
def server() -> Iterator[StoreServer]:
    made = StoreServer(HOST, SECRET, 3)
    yield made
    made.close()


def connected(server: StoreServer, secret: str = SECRET) -> KeyValueStore:
    return KeyValueStore(StoreConnection(HOST, server.port, secret, LIMIT_S))


def stranger(server: StoreServer) -> socket.socket:
    return socket.create_connection((HOST, server.port), timeout=LIMIT_S)


def all_of(connection: socket.socket) -> bytes:
    """Read until the other side hangs up."""
    received = b""
    try:
        while part := connection.recv(1000):
            received += part
    except ConnectionResetError:
        pass
    return received


Call = Callable[[Any], Any]
CALLS: dict[str, Call] = {
    "set and get": lambda s: (s.set("a", "ü"), s.get("a"), s.set("a", b"\xff\x00"), s.get("a")),
    "another value": lambda s: (s.set("a", "1"), s.set("a", ""), s.get("a")),
    "add": lambda s: (s.add("n", 2), s.add("n", -5), s.get("n")),
    "check": lambda s: (s.check(["a"]), s.set("a", ""), s.check(["a"]), s.check(["a", "b"])),
    "compare_set": lambda s: (
        s.compare_set("a", "other", "new"),
        s.compare_set("a", "", "new"),
        s.compare_set("a", "old", "newer"),
        s.compare_set("a", "new", "newer"),
        s.get("a"),
    ),
    "append": lambda s: (s.append("a", "b"), s.append("a", "c"), s.get("a")),
    "keys": lambda s: (s.set("a", ""), s.num_keys(), s.delete_key("a"), s.delete_key("a")),
    "wait": lambda s: (s.set("a", ""), s.wait(["a"]), s.wait(["a"], timedelta(seconds=1))),
    "clone": lambda s: (s.set("a", "1"), s.clone().get("a")),
    "time limit": lambda s: (s.set_timeout(timedelta(seconds=7)), s.timeout),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_does_what_torchs_own_does(name: str, server: StoreServer) -> None:
    call, store = CALLS[name], connected(server)
    # Torch calls it by a prefix, which is what it gives to each group.
    assert call(dist.PrefixStore("x", store)) == call(dist.PrefixStore("x", dist.HashStore()))
    assert server.values.keys() <= {"x/a", "x/n"}


def test_a_key_is_waited_for(server: StoreServer) -> None:
    one, other = connected(server), connected(server)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(one.get("late")))
    thread.start()
    time.sleep(0.05)
    other.set("late", "x")
    thread.join(LIMIT_S)
    assert found == [b"x"]
    with pytest.raises(dist.DistStoreError, match=r"after 0\.3 s, keys: late, never"):
        one.wait(["late", "never"], timedelta(seconds=0.3))
    one.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(dist.DistStoreError, match="never"):
        dist.PrefixStore("x", one).get("never")
    assert one.get("late") == b"x"  # the connection goes on


def test_who_waits_leaves_the_connection_to_other_threads(server: StoreServer) -> None:
    store = connected(server)
    thread = threading.Thread(target=lambda: store.get("here"))
    thread.start()
    time.sleep(0.05)
    store.set("here", "")
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_ranks_meet_by_it(server: StoreServer) -> None:
    def run(rank: int) -> None:
        store = connected(server)
        group = torch_compat.gloo_group(store, "all", rank, 3, LIMIT_S, HOST)
        tensor = torch.full((5,), rank + 1.0)
        torch_compat.all_reduce(group, tensor, ReduceOp.SUM).wait()
        assert tensor.eq(6.0).all()

    on_ranks(3, run)


def test_a_stranger_gets_a_nonce_and_no_more(server: StoreServer) -> None:
    store = connected(server)
    store.set("key", "value")
    nonces = set()
    for message in (b"", b"\x00", bytes(NONCE + PROOF), b'["get", "key"]' * 1000):
        with closing(stranger(server)) as connection:
            nonces.add(connection.recv(NONCE))
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            assert all_of(connection) == b""
    assert len(nonces) == 4 and {len(nonce) for nonce in nonces} == {NONCE}
    with pytest.raises(ConnectionError):
        connected(server, "a guess")
    assert store.get("key") == b"value"


def test_an_answer_is_proof_of_one_connection_only(server: StoreServer) -> None:
    """What a rank has sent can be heard on the way, and is worth nothing a second time."""
    with closing(stranger(server)) as first, closing(stranger(server)) as second:
        nonce = bytes(NONCE)
        heard = nonce + key_value_store._proof(SECRET, "rank", first.recv(NONCE), nonce)
        first.sendall(heard)
        assert len(first.recv(PROOF)) == PROOF
        second.recv(NONCE)
        second.sendall(heard)
        assert all_of(second) == b""


def test_torchs_own_client_lists_nothing(server: StoreServer) -> None:
    connected(server).set("key", "value")
    with pytest.raises(RuntimeError):
        client = dist.TCPStore(
            HOST, server.port, timeout=timedelta(seconds=0.5), wait_for_workers=False
        )
        client.list_keys()


def test_who_listens_there_has_to_prove_it_too() -> None:
    with socket.create_server((HOST, 0)) as listener:

        def pretend() -> None:
            with closing(listener.accept()[0]) as connection:
                connection.sendall(bytes(NONCE))
                connection.recv(NONCE + PROOF)
                connection.sendall(bytes(PROOF))

        threading.Thread(target=pretend, daemon=True).start()
        with pytest.raises(ConnectionError, match="does not know the secret"):
            StoreConnection(HOST, listener.getsockname()[1], SECRET, LIMIT_S)


def test_who_says_nothing_is_hung_up_on(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = connected(server)
    monkeypatch.setattr(key_value_store, "_HELLO_S", 0.2)
    with closing(stranger(server)) as silent:
        assert all_of(silent)[NONCE:] == b""
        time.sleep(0.3)
        store.set("key", "value")  # a rank may be silent


def test_strangers_keep_no_rank_out(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_value_store, "_MAX_UNVERIFIED", 5)
    strangers = [stranger(server) for _ in range(20)]
    assert connected(server).num_keys() == 0
    assert all(all_of(one) for one in strangers[:12])  # ended: three ranks are still to come
    for one in strangers:
        one.close()


def test_nobody_can_connect_once_all_have(server: StoreServer) -> None:
    with closing(stranger(server)) as early:
        stores = [connected(server) for _ in range(3)]
        stores[0].set("key", "value")
        with pytest.raises(ConnectionRefusedError):
            stranger(server)
        early.sendall(bytes(NONCE + PROOF))
        assert len(all_of(early)) == NONCE
    assert stores[2].get("key") == b"value"


def test_a_keeper_that_is_gone_or_frozen(server: StoreServer) -> None:
    gone, frozen = connected(server), connected(server)
    frozen._connection._socket.settimeout(0.3)
    release, stopped = threading.Event(), threading.Event()
    server.loop.call_soon_threadsafe(stopped.set)
    server.loop.call_soon_threadsafe(release.wait, LIMIT_S)
    stopped.wait(LIMIT_S)
    for _ in range(2):  # and from then on: an answer to the first question may still come
        with pytest.raises(dist.DistNetworkError, match="no answer from the store"):
            frozen.check(["a"])
    release.set()
    server.close()
    server._thread.join(LIMIT_S)
    with pytest.raises(dist.DistNetworkError, match="no answer from the store"):
        for _ in range(2):
            gone.set("key", "value")


def test_nothing_is_left_of_it() -> None:
    def one_group() -> None:
        server = StoreServer(HOST, SECRET, 2)
        stores = [connected(server) for _ in range(2)]
        stores[0].set("a", "")
        server.close(after_s=0.01)
        server._thread.join(LIMIT_S)
        assert not server._thread.is_alive()

    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    one_group()
    before = state()
    groups = 20
    for _ in range(groups):
        one_group()
    # A leak grows with every group. Threads of earlier tests may open a file or two meanwhile.
    assert all(now - was < groups for now, was in zip(state(), before, strict=True))


def test_a_hundred_ranks_may_come_at_once() -> None:
    """None of them is taken for one stranger too many."""
    ranks = 2 * key_value_store._MAX_UNVERIFIED
    server = StoreServer(HOST, SECRET, ranks)
    come = [stranger(server) for _ in range(ranks)]
    theirs = [one.recv(NONCE) for one in come]
    for one, keepers_nonce in zip(come, theirs, strict=True):
        nonce = os.urandom(NONCE)
        one.sendall(nonce + key_value_store._proof(SECRET, "rank", keepers_nonce, nonce))
        proof = key_value_store._proof(SECRET, "keeper", keepers_nonce, nonce)
        assert one.recv(PROOF) == proof
    for one in come:
        one.close()
    server.close()
