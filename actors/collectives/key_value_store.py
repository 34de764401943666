"""
The store by which the ranks of a torch group find each other: rank 0 keeps it for ranks alone.

torch's own TCPStore answers whoever connects, and lists its keys. Here both sides prove first that
they know the group's secret, which they have from Ray's store.

    rank r                                          rank 0
      connect                   ------------->
                                <-------------      a nonce
      a nonce, proof of "rank"  ------------->      wrong, or late: it hangs up without a word
                                <-------------      proof of "keeper"
      request                   ------------->      JSON behind its length
                                <-------------      answer

Nobody can connect any more once all ranks have. What goes over the connections is not secret.
(docs/decisions/store_of_a_group.md)
"""

import asyncio
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

from torch.distributed import DistNetworkError, DistStoreError, Store  # type: ignore[attr-defined]
from typing_extensions import override

_NONCE_BYTES = _PROOF_BYTES = 32
_LENGTH_BYTES = 4
_LARGEST_BYTES = 1 << 26
"""A longer request is none of ours."""
_HELLO_S = 5.0
"""Who has not proved itself by then is no rank."""
_STRANGERS = 64
"""Connections at a time that have not proved themselves; beyond them the oldest one ends."""
_SLICE_S = 0.25
"""A wait leaves the connection to others so often."""


def _proof(secret: str, side: str, keepers_nonce: bytes, ranks_nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), side.encode() + keepers_nonce + ranks_nonce, "sha256")


def _frame(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "big") + text


class StoreServer:
    """
    Keeps a store on a port of its own, in a thread.

    Args:
        host: address to listen on.
        secret: of the group.
        ranks: connections that there will be; the port closes with the last one.
    """

    def __init__(self, host: str, secret: str, ranks: int) -> None:
        listener = socket.create_server((host, 0), backlog=max(ranks, 128))
        self.port: int = listener.getsockname()[1]
        self.secret = secret
        self.values: dict[str, str] = {}
        self._connections_left = ranks
        self._strangers: dict[_Rank, None] = {}  #: in the order in which they came
        self._ranks: set[_Rank] = set()
        self._ended = asyncio.Event()
        self.loop = asyncio.new_event_loop()
        serve = self._serve(listener)
        self._thread = threading.Thread(target=self._run, args=(serve,), name="store", daemon=True)
        self._thread.start()

    def close(self, after_s: float = 0.0) -> None:
        """Serve no more from then on; does not wait for it."""
        end = self._ended.set
        with suppress(RuntimeError):  # it is over already
            self.loop.call_soon_threadsafe(lambda: self.loop.call_later(after_s, end))

    def came(self, rank: "_Rank") -> None:
        """Bear with somebody who has connected, for a while."""
        self._strangers[rank] = None
        if len(self._strangers) > _STRANGERS:
            oldest = next(iter(self._strangers))
            self.left(oldest)
            oldest.hang_up()

    def proved(self, rank: "_Rank") -> None:
        """Count somebody as one of the ranks."""
        self._strangers.pop(rank, None)
        self._ranks.add(rank)
        self._connections_left -= 1
        if self._connections_left == 0:
            self._server.close()

    def left(self, rank: "_Rank") -> None:
        """Forget somebody whose connection is over."""
        self._strangers.pop(rank, None)
        self._ranks.discard(rank)

    def changed(self) -> None:
        """Answer those who wait for keys that are there now."""
        for rank in [*self._ranks]:
            rank.look()

    def _run(self, serve: Any) -> None:
        try:
            self.loop.run_until_complete(serve)
        finally:
            self.loop.close()

    async def _serve(self, listener: socket.socket) -> None:
        self._server = await self.loop.create_server(
            lambda: _Rank(self), sock=listener, start_serving=False
        )
        await self._server.start_serving()
        await self._ended.wait()
        self._server.close()
        for rank in [*self._strangers, *self._ranks]:
            rank.hang_up()
        await asyncio.sleep(0)  # the connections close in the loop's next round


class _Rank(asyncio.Protocol):
    """One connection of a store's server: a stranger's until it has proved that it is a rank's."""

    def __init__(self, server: StoreServer) -> None:
        self._server = server
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._received = bytearray()
        self._proved = False
        self._wanted: list[str] = []  #: keys that are waited for
        self._late: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._nonce)
        self._late = self._server.loop.call_later(_HELLO_S, self.hang_up)
        self._server.came(self)

    @override
    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._proved:
            self._prove()
        while self._proved and (request := self._request()) is not None:
            self._answer(*json.loads(request))

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_wait()
        self._server.left(self)

    def hang_up(self) -> None:
        """Close the connection, without a word."""
        self._transport.abort()

    def look(self) -> None:
        """Answer if all is there that is waited for."""
        if self._wanted and all(key in self._server.values for key in self._wanted):
            self._forget_wait()
            self._write(True)

    def _prove(self) -> None:
        """Compare what has come with what only a rank can send; answer in kind."""
        if len(self._received) < _NONCE_BYTES + _PROOF_BYTES:
            return
        nonce = bytes(self._take(_NONCE_BYTES))
        secret = self._server.secret
        if not hmac.compare_digest(
            self._take(_PROOF_BYTES), _proof(secret, "rank", self._nonce, nonce)
        ):
            self.hang_up()
            return
        self._forget_wait()
        self._proved = True
        self._server.proved(self)
        self._transport.write(_proof(secret, "keeper", self._nonce, nonce))

    def _request(self) -> bytes | None:
        """Give the next request if all of it has come."""
        if len(self._received) < _LENGTH_BYTES:
            return None
        length = int.from_bytes(self._received[:_LENGTH_BYTES], "big")
        if length > _LARGEST_BYTES:
            self.hang_up()
            return None
        if len(self._received) < _LENGTH_BYTES + length:
            return None
        self._take(_LENGTH_BYTES)
        return self._take(length)

    def _answer(self, operation: str, *arguments: Any) -> None:
        if operation == "wait":
            self._wanted, limit_s = arguments
            self._late = self._server.loop.call_later(limit_s, self._give_up)
            self.look()
            return
        before = len(self._server.values)
        self._write(_OPERATIONS[operation](self._server.values, *arguments))
        if len(self._server.values) > before:
            self._server.changed()

    def _give_up(self) -> None:
        self._forget_wait()
        self._write(False)

    def _forget_wait(self) -> None:
        self._wanted = []
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _take(self, length: int) -> bytes:
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken

    def _write(self, answer: Any) -> None:
        self._transport.write(_frame(answer))


def _add(values: dict[str, str], key: str, number: int) -> int:
    values[key] = str(int(values.get(key, 0)) + number)
    return int(values[key])


def _compare_set(values: dict[str, str], key: str, expected: str, desired: str) -> str:
    """Set a value if it is the expected one; one that is not there, if none is expected."""
    if values.get(key, "") != expected:
        return values.get(key, expected)
    values[key] = desired
    return desired


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "set": dict.__setitem__,
    "get": dict.get,
    "add": _add,
    "compare_set": _compare_set,
    "check": lambda values, keys: all(key in values for key in keys),
    "delete": lambda values, key: values.pop(key, None) is not None,
    "count": len,
}


class StoreConnection:
    """
    One rank's connection to the server; threads may share it.

    Args:
        host: the server's.
        port: the server's.
        secret: the group's.
        answer_s: deadline of each answer, and of the beginning.

    Raises:
        OSError: nobody is there, or nobody who knows the secret.
    """

    def __init__(self, host: str, port: int, secret: str, answer_s: float) -> None:
        self._lock = threading.Lock()
        self._answer_s = answer_s
        self._socket = socket.create_connection((host, port), timeout=answer_s)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keepers_nonce, nonce = self._receive(_NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
            self._socket.sendall(nonce + _proof(secret, "rank", keepers_nonce, nonce))
            expected = _proof(secret, "keeper", keepers_nonce, nonce)
            if not hmac.compare_digest(self._receive(_PROOF_BYTES), expected):
                raise ConnectionError("who listens there does not know the secret of the group")
        except OSError:
            self._socket.close()
            raise

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()

    def ask(self, operation: str, *arguments: Any) -> Any:
        """
        Have the server do something.

        Raises:
            OSError: it did not answer in time, or is gone; so it is from then on.
        """
        with self._lock:
            try:
                self._socket.sendall(_frame([operation, *arguments]))
                length = int.from_bytes(self._receive(_LENGTH_BYTES), "big")
                return json.loads(self._receive(length))
            except OSError:
                self._socket.close()  # the answer to another question may still come
                raise

    def _receive(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length:
            part = self._socket.recv(length - len(received))
            if not part:
                raise ConnectionError("it has closed the connection")
            received += part
        return bytes(received)


class KeyValueStore(Store):
    """
    What torch wants of a store, over a connection; values are bytes there, and Latin-1 on the way.

    torch calls these methods from threads of its own, by these names. It does not keep the object:
    whoever makes a group with it does.

    Args:
        connection: to the server.
    """

    def __init__(self, connection: StoreConnection) -> None:
        super().__init__()
        self._connection = connection

    @override
    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", key, _text(value))

    @override
    def get(self, key: str) -> bytes:
        self.wait([key])
        return str(self._ask("get", key)).encode("latin-1")

    @override
    def add(self, key: str, value: int) -> int:
        return int(self._ask("add", key, value))

    @override
    def compare_set(
        self, key: str, expected_value: str | bytes, desired_value: str | bytes
    ) -> bytes:
        found = self._ask("compare_set", key, _text(expected_value), _text(desired_value))
        return str(found).encode("latin-1")

    @override
    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", keys))

    @override
    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        limit = (timeout or cast(Any, self).timeout).total_seconds()
        deadline = time.monotonic() + limit
        while not self._ask("wait", [*keys], max(0.0, min(_SLICE_S, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise DistStoreError(f"wait timeout after {limit:g} s, keys: {', '.join(keys)}")

    @override
    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete", key))

    @override
    def num_keys(self) -> int:
        return int(self._ask("count"))

    deleteKey, getNumKeys = delete_key, num_keys  # torch looks for these

    def clone(self) -> "KeyValueStore":
        """Give what other threads may use beside this: the same, for they share the connection."""
        return self

    def _ask(self, operation: str, *arguments: Any) -> Any:
        try:
            return self._connection.ask(operation, *arguments)
        except OSError as error:
            raise DistNetworkError(f"no answer from the store: {error}") from None


def _text(value: str | bytes) -> str:
    return value.encode().decode("latin-1") if isinstance(value, str) else value.decode("latin-1")
