"""
Key-value store of a torch group with authentication, served by rank 0.

torch's own TCPStore accepts any connection, and lists its keys. Here both sides first prove that
they know the group's secret, which they have read from Ray's store.

    rank r                                          rank 0
      connect                   ------------->
                                <-------------      nonce
      nonce, proof of "rank"    ------------->      wrong or late: closes the connection
                                <-------------      proof of "keeper"
      request                   ------------->      JSON after its length
                                <-------------      answer

Once all ranks have connected, the port closes. The connections are not encrypted: they carry no
secrets. (docs/decisions/store_of_a_group.md)
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
_HELLO_S = 5.0
"""Deadline for a new connection to prove that it is a rank."""
_MAX_UNVERIFIED = 64
"""Unverified connections at a time, in addition to those of all ranks; the oldest one is closed
if there are more."""
_SLICE_S = 0.25
"""Period at which a wait releases the connection to other threads."""


def _proof(secret: str, side: str, server_nonce: bytes, rank_nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), side.encode() + server_nonce + rank_nonce, "sha256")


def _frame(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "big") + text


class StoreServer:
    """
    Serves a store on its own port, in a thread.

    Args:
        host: address to listen on.
        secret: of the group.
        ranks: number of connections to accept; then the port closes.
    """

    def __init__(self, host: str, secret: str, ranks: int) -> None:
        listener = socket.create_server((host, 0), backlog=max(ranks, 128))
        self.port: int = listener.getsockname()[1]
        self.values: dict[str, str] = {}
        self._secret, self._connections_left = secret, ranks
        self._unverified: dict[asyncio.StreamWriter, None] = {}  #: oldest first
        self._connections: set[asyncio.Task[None]] = set()
        self._key_added = asyncio.Condition()
        self._ended = asyncio.Event()
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.loop = self._runner.get_loop()
        self._thread = threading.Thread(
            target=self._run, args=(listener,), name="store", daemon=True
        )
        self._thread.start()

    def close(self, after_s: float = 0.0) -> None:
        """Stop serving after `after_s` seconds; returns at once."""
        end = self._ended.set
        with suppress(RuntimeError):  # the loop has ended already
            self.loop.call_soon_threadsafe(lambda: self.loop.call_later(after_s, end))

    def _run(self, listener: socket.socket) -> None:
        with self._runner:  # closes the connections, too
            self._runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._accept, sock=listener, start_serving=False)
        await self._server.start_serving()
        await self._ended.wait()
        self._server.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle a connection in a new task: Python 3.11 logs errors for asyncio's own tasks."""
        task = self.loop.create_task(self._handle(reader, writer))
        self._connections.add(task)  # asyncio itself holds only weak references to tasks
        task.add_done_callback(self._connections.discard)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Verify a connection, then answer its requests until it ends."""
        self._unverified[writer] = None
        # All ranks may connect at the same time.
        if len(self._unverified) > _MAX_UNVERIFIED + self._connections_left:
            oldest = next(iter(self._unverified))
            del self._unverified[oldest]
            oldest.transport.abort()
        try:
            async with asyncio.timeout(_HELLO_S):
                await self._verify(reader, writer)
            while True:
                length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
                request = json.loads(await reader.readexactly(length))
                writer.write(_frame(await self._answer(*request)))
        except (OSError, EOFError):  # the connection is closed, or was not verified
            pass
        finally:
            self._unverified.pop(writer, None)
            writer.transport.abort()

    async def _verify(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Check the proof of a rank, and send the server's proof."""
        server_nonce = secrets.token_bytes(_NONCE_BYTES)
        writer.write(server_nonce)
        nonce, proof = (
            await reader.readexactly(_NONCE_BYTES),
            await reader.readexactly(_PROOF_BYTES),
        )
        valid = hmac.compare_digest(proof, _proof(self._secret, "rank", server_nonce, nonce))
        if not valid or writer not in self._unverified:  # `_handle` may have closed it
            raise PermissionError
        del self._unverified[writer]
        writer.write(_proof(self._secret, "keeper", server_nonce, nonce))
        self._connections_left -= 1
        if self._connections_left == 0:
            self._server.close()

    async def _answer(self, operation: str, *arguments: Any) -> Any:
        if operation == "wait":
            return await self._wait(*arguments)
        count = len(self.values)
        answer = _OPERATIONS[operation](self.values, *arguments)
        if len(self.values) > count:
            async with self._key_added:
                self._key_added.notify_all()
        return answer

    async def _wait(self, keys: list[str], limit_s: float) -> bool:
        """Wait until all keys exist; return whether they do."""
        try:
            async with asyncio.timeout(limit_s), self._key_added:
                return await self._key_added.wait_for(lambda: _check(self.values, keys))
        except TimeoutError:
            return False


def _add(values: dict[str, str], key: str, number: int) -> int:
    values[key] = str(int(values.get(key, 0)) + number)
    return int(values[key])


def _check(values: dict[str, str], keys: list[str]) -> bool:
    return all(key in values for key in keys)


def _compare_set(values: dict[str, str], key: str, expected: str, desired: str) -> str:
    """Set a value if the current one is `expected`; an empty `expected` matches a missing key."""
    if values.get(key, "") != expected:
        return values.get(key, expected)
    values[key] = desired
    return desired


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "set": dict.__setitem__,
    "get": dict.get,
    "add": _add,
    "compare_set": _compare_set,
    "check": _check,
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
        answer_s: deadline of each answer, and of the connection.

    Raises:
        OSError: there is no server, or it does not know the secret.
    """

    def __init__(self, host: str, port: int, secret: str, answer_s: float) -> None:
        self._lock = threading.Lock()
        self._answer_s = answer_s
        self._socket = socket.create_connection((host, port), timeout=answer_s)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server_nonce, nonce = self._receive(_NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
            self._socket.sendall(nonce + _proof(secret, "rank", server_nonce, nonce))
            expected = _proof(secret, "keeper", server_nonce, nonce)
            if not hmac.compare_digest(self._receive(_PROOF_BYTES), expected):
                raise ConnectionError("the server does not know the secret of the group")
        except OSError:
            self._socket.close()
            raise

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()

    def ask(self, operation: str, *arguments: Any) -> Any:
        """
        Send a request to the server, and return the answer.

        Raises:
            OSError: the server did not answer in time, or is gone; all later requests fail, too.
        """
        with self._lock:
            try:
                self._socket.sendall(_frame([operation, *arguments]))
                length = int.from_bytes(self._receive(_LENGTH_BYTES), "big")
                return json.loads(self._receive(length))
            except OSError:
                self._socket.close()  # a late answer would be read as that of the next request
                raise

    def _receive(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length:
            part = self._socket.recv(length - len(received))
            if not part:
                raise ConnectionError("the server has closed the connection")
            received += part
        return bytes(received)


class StoreTimeout(DistStoreError):
    """Keys were not set in time; torch expects stores to raise its `DistStoreError`."""


class KeyValueStore(Store):
    """
    Implementation of torch's `Store` over a connection; the byte values are sent as Latin-1.

    torch calls these methods by name from its own threads. It does not hold a reference to the
    object: the code that creates a group with it must.
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
        value = self._ask("compare_set", key, _text(expected_value), _text(desired_value))
        return str(value).encode("latin-1")

    @override
    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", keys))

    @override
    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        limit = (timeout or cast(Any, self).timeout).total_seconds()
        deadline = time.monotonic() + limit
        while not self._ask("wait", [*keys], max(0.0, min(_SLICE_S, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise StoreTimeout(f"wait timeout after {limit:g} s, keys: {', '.join(keys)}")

    @override
    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete", key))

    @override
    def num_keys(self) -> int:
        return int(self._ask("count"))

    deleteKey, getNumKeys = delete_key, num_keys  # the names that torch calls

    def clone(self) -> "KeyValueStore":
        """Return this store: it is thread-safe."""
        return self

    def _ask(self, operation: str, *arguments: Any) -> Any:
        try:
            return self._connection.ask(operation, *arguments)
        except OSError as error:
            raise DistNetworkError(f"no answer from the store: {error}") from None


def _text(value: str | bytes) -> str:
    return value.encode().decode("latin-1") if isinstance(value, str) else value.decode("latin-1")
