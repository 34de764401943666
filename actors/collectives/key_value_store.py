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
_HELLO_S = 5.0
"""Deadline for a new connection to prove that it is a rank."""
_STRANGERS = 64
"""Connections at a time, beside those of all ranks, that have not proved themselves; beyond them
the oldest one ends."""
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
        self.values: dict[str, str] = {}
        self._secret, self._connections_left = secret, ranks
        self._pending: dict[asyncio.StreamWriter, None] = {}  #: in the order in which they came
        self._connections: set[asyncio.Task[None]] = set()
        self._more = asyncio.Condition()  #: there are new keys
        self._ended = asyncio.Event()
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.loop = self._runner.get_loop()
        self._thread = threading.Thread(
            target=self._run, args=(listener,), name="store", daemon=True
        )
        self._thread.start()

    def close(self, after_s: float = 0.0) -> None:
        """Serve no more from then on; does not wait for it."""
        end = self._ended.set
        with suppress(RuntimeError):  # it is over already
            self.loop.call_soon_threadsafe(lambda: self.loop.call_later(after_s, end))

    def _run(self, listener: socket.socket) -> None:
        with self._runner:  # ends the connections too
            self._runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._accept, sock=listener, start_serving=False)
        await self._server.start_serving()
        await self._ended.wait()
        self._server.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Begin to talk: in a task of ours, as Python 3.11 complains of its own at the end."""
        talk = self.loop.create_task(self._handle(reader, writer))
        self._connections.add(talk)  # nobody else may hold it while it waits
        talk.add_done_callback(self._connections.discard)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer whoever has connected, once it has proved that it is a rank."""
        self._pending[writer] = None
        if len(self._pending) > _STRANGERS + self._connections_left:  # all ranks may come at once
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            oldest.transport.abort()
        try:
            async with asyncio.timeout(_HELLO_S):
                await self._verify(reader, writer)
            while True:
                length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
                request = json.loads(await reader.readexactly(length))
                writer.write(_frame(await self._answer(*request)))
        except (OSError, EOFError):  # it is gone, or was no rank
            pass
        finally:
            self._pending.pop(writer, None)
            writer.transport.abort()

    async def _verify(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Compare what comes with what only a rank can send; answer in kind."""
        keepers_nonce = secrets.token_bytes(_NONCE_BYTES)
        writer.write(keepers_nonce)
        nonce, proof = (
            await reader.readexactly(_NONCE_BYTES),
            await reader.readexactly(_PROOF_BYTES),
        )
        right = hmac.compare_digest(proof, _proof(self._secret, "rank", keepers_nonce, nonce))
        if not right or writer not in self._pending:  # or it has just been ended
            raise PermissionError
        del self._pending[writer]
        writer.write(_proof(self._secret, "keeper", keepers_nonce, nonce))
        self._connections_left -= 1
        if self._connections_left == 0:
            self._server.close()

    async def _answer(self, operation: str, *arguments: Any) -> Any:
        if operation == "wait":
            return await self._wait(*arguments)
        before = len(self.values)
        answer = _OPERATIONS[operation](self.values, *arguments)
        if len(self.values) > before:
            async with self._more:
                self._more.notify_all()
        return answer

    async def _wait(self, keys: list[str], limit_s: float) -> bool:
        """Wait until all keys are there; say whether they are."""
        try:
            async with asyncio.timeout(limit_s), self._more:
                return await self._more.wait_for(lambda: _check(self.values, keys))
        except TimeoutError:
            return False


def _add(values: dict[str, str], key: str, number: int) -> int:
    values[key] = str(int(values.get(key, 0)) + number)
    return int(values[key])


def _check(values: dict[str, str], keys: list[str]) -> bool:
    return all(key in values for key in keys)


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


class StoreTimeout(DistStoreError):
    """Keys did not come in time; the type is torch's, which expects it of a store."""


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
