"""The store of a torch group behaves as torch's stores, with authenticated ranks only."""

import os
import socket
import threading
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
    store_server = StoreServer(HOST, SECRET, 3)
    yield store_server
    store_server.close()


def connect(server: StoreServer, secret: str = SECRET) -> KeyValueStore:
    return KeyValueStore(StoreConnection(HOST, server.port, secret, LIMIT_S))


def connect_unverified(server: StoreServer) -> socket.socket:
    return socket.create_connection((HOST, server.port), timeout=LIMIT_S)


def receive_all(connection: socket.socket) -> bytes:
    """Read until the peer closes the connection."""
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
def test_behaves_as_torchs_store(name: str, server: StoreServer) -> None:
    call, store = CALLS[name], connect(server)
    # Torch accesses the store through a PrefixStore, one for each group.
    assert call(dist.PrefixStore("x", store)) == call(dist.PrefixStore("x", dist.HashStore()))
    assert server.values.keys() <= {"x/a", "x/n"}


def event_of_wait(server: StoreServer) -> threading.Event:
    """Return an event that is set when the server receives a request to wait for keys."""
    received, wait = threading.Event(), server._wait

    async def signal_and_wait(keys: list[str], limit_s: float) -> bool:
        received.set()
        return await wait(keys, limit_s)

    server._wait = signal_and_wait  # type: ignore[method-assign]
    return received


def test_get_waits_for_a_key(server: StoreServer) -> None:
    waiter, writer = connect(server), connect(server)
    values: list[bytes] = []
    thread = threading.Thread(target=lambda: values.append(waiter.get("late")))
    waiting = event_of_wait(server)
    thread.start()
    assert waiting.wait(LIMIT_S)
    writer.set("late", "x")
    thread.join(LIMIT_S)
    assert values == [b"x"]
    with pytest.raises(dist.DistStoreError, match=r"after 0\.3 s, keys: late, never"):
        waiter.wait(["late", "never"], timedelta(seconds=0.3))
    waiter.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(dist.DistStoreError, match="never"):
        dist.PrefixStore("x", waiter).get("never")
    assert waiter.get("late") == b"x"  # the connection stays usable


def test_waiting_thread_does_not_block_the_connection(server: StoreServer) -> None:
    store = connect(server)
    thread = threading.Thread(target=lambda: store.get("here"))
    waiting = event_of_wait(server)
    thread.start()
    assert waiting.wait(LIMIT_S)
    store.set("here", "")
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_gloo_group_rendezvous(server: StoreServer) -> None:
    def all_reduce(rank: int) -> None:
        store = connect(server)
        group = torch_compat.gloo_group(store, "all", rank, 3, LIMIT_S, HOST)
        tensor = torch.full((5,), rank + 1.0)
        torch_compat.all_reduce(group, tensor, ReduceOp.SUM).wait()
        assert tensor.eq(6.0).all()

    on_ranks(3, all_reduce)


def test_unverified_client_gets_only_a_nonce(server: StoreServer) -> None:
    store = connect(server)
    store.set("key", "value")
    nonces = set()
    for message in (b"", b"\x00", bytes(NONCE + PROOF), b'["get", "key"]' * 1000):
        with closing(connect_unverified(server)) as connection:
            nonces.add(connection.recv(NONCE))
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b""
    assert len(nonces) == 4 and {len(nonce) for nonce in nonces} == {NONCE}
    with pytest.raises(ConnectionError):
        connect(server, "a guess")
    assert store.get("key") == b"value"


def test_proof_cannot_be_replayed(server: StoreServer) -> None:
    """A captured proof of a rank must not be replayable."""
    with (
        closing(connect_unverified(server)) as first,
        closing(connect_unverified(server)) as second,
    ):
        nonce = bytes(NONCE)
        proof = nonce + key_value_store._proof(SECRET, "rank", first.recv(NONCE), nonce)
        first.sendall(proof)
        assert len(first.recv(PROOF)) == PROOF
        second.recv(NONCE)
        second.sendall(proof)
        assert receive_all(second) == b""


def test_torchs_client_is_rejected(server: StoreServer) -> None:
    connect(server).set("key", "value")
    with pytest.raises(RuntimeError):
        client = dist.TCPStore(
            HOST, server.port, timeout=timedelta(seconds=0.5), wait_for_workers=False
        )
        client.list_keys()


def test_server_must_prove_the_secret() -> None:
    with socket.create_server((HOST, 0)) as listener:

        def send_false_proof() -> None:
            with closing(listener.accept()[0]) as connection:
                connection.sendall(bytes(NONCE))
                connection.recv(NONCE + PROOF)
                connection.sendall(bytes(PROOF))

        threading.Thread(target=send_false_proof, daemon=True).start()
        with pytest.raises(ConnectionError, match="does not know the secret"):
            StoreConnection(HOST, listener.getsockname()[1], SECRET, LIMIT_S)


def test_silent_client_is_disconnected(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_value_store, "_HELLO_S", 1.0)
    store = connect(server)  # its deadline is before that of the silent client
    with closing(connect_unverified(server)) as silent:
        assert receive_all(silent)[NONCE:] == b""
        store.set("key", "value")  # a verified rank may be silent


def test_unverified_clients_do_not_block_ranks(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_value_store, "_HELLO_S", 60.0)  # later than the test ends
    monkeypatch.setattr(key_value_store, "_MAX_UNVERIFIED", 5)
    clients = [connect_unverified(server) for _ in range(20)]
    assert connect(server).num_keys() == 0
    assert all(receive_all(client) for client in clients[:12])  # closed by the server
    for client in clients:
        client.close()


def test_no_connections_after_all_ranks_have_connected(server: StoreServer) -> None:
    with closing(connect_unverified(server)) as early:
        stores = [connect(server) for _ in range(3)]
        stores[0].set("key", "value")
        with pytest.raises(ConnectionRefusedError):
            connect_unverified(server)
        early.sendall(bytes(NONCE + PROOF))
        assert len(receive_all(early)) == NONCE
    assert stores[2].get("key") == b"value"


def test_closed_or_frozen_server_raises_network_errors(server: StoreServer) -> None:
    disconnected, frozen = connect(server), connect(server)
    frozen._connection._socket.settimeout(0.3)
    release, stopped = threading.Event(), threading.Event()
    server.loop.call_soon_threadsafe(stopped.set)
    server.loop.call_soon_threadsafe(release.wait, LIMIT_S)
    stopped.wait(LIMIT_S)
    for _ in range(2):  # the second call, too: a late answer to the first may still arrive
        with pytest.raises(dist.DistNetworkError, match="no answer from the store"):
            frozen.check(["a"])
    release.set()
    server.close()
    server._thread.join(LIMIT_S)
    with pytest.raises(dist.DistNetworkError, match="no answer from the store"):
        for _ in range(2):
            disconnected.set("key", "value")


def test_close_leaks_no_descriptors_or_threads() -> None:
    def open_and_close_group() -> None:
        server = StoreServer(HOST, SECRET, 2)
        stores = [connect(server) for _ in range(2)]
        stores[0].set("a", "")
        server.close(after_s=0.01)
        server._thread.join(LIMIT_S)
        assert not server._thread.is_alive()

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    open_and_close_group()
    before = counts()
    groups = 20
    for _ in range(groups):
        open_and_close_group()
    # A leak grows with every group. Threads of earlier tests may open a few files meanwhile.
    assert all(after - count < groups for after, count in zip(counts(), before, strict=True))


def test_many_ranks_may_connect_at_once() -> None:
    """The limit on unverified connections must not reject ranks."""
    ranks = 2 * key_value_store._MAX_UNVERIFIED
    server = StoreServer(HOST, SECRET, ranks)
    clients = [connect_unverified(server) for _ in range(ranks)]
    server_nonces = [client.recv(NONCE) for client in clients]
    for client, server_nonce in zip(clients, server_nonces, strict=True):
        nonce = os.urandom(NONCE)
        client.sendall(nonce + key_value_store._proof(SECRET, "rank", server_nonce, nonce))
        proof = key_value_store._proof(SECRET, "keeper", server_nonce, nonce)
        assert client.recv(PROOF) == proof
    for client in clients:
        client.close()
    server.close()
