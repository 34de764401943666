"""
Mailboxes between a worker and the servers on its node: control messages without Ray calls.

    worker                          shared memory                server node, a thread per worker
    write the request, post   ──▶   requests + 1   ──▶           wake up, handle it like a call
    wake up, read the reply   ◀──   replies  + 1   ◀──           write the reply, post

    `listen`: a Ray call that stays open while the mailbox is in use. It raises an exception when
    the server dies, or when a request fails; all errors are reported this way.

A Ray call takes about a millisecond on a busy machine, a futex a few hundredths of one. The effect
of a request is the same in both cases, and the shard's ledger checks both.
(docs/decisions/mailboxes.md)
"""

import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distplat.actors.memory import futex
from distplat.actors.memory.futex import Word, has_ended
from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import MemoryAddress
from distplat.actors.transport import ActorDied, Transport, Unanswered
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import ActorLost, DeadlineExceeded
from distplat.platform.ledger import ServerReply
from distplat.strategies.loop.control import HEAD_SIZE

logger = logging.getLogger(__name__)

SLOT_BYTES = 512
"""Size of one mailbox; worker and server write to separate cache lines."""
_REQUESTS, _REQUEST, _CLOSED, _REPLIES, _REPLY = 0, 8, 64, 128, 136
_REQUEST_LAYOUT = struct.Struct("<q?dq")
_REPLY_LAYOUT = struct.Struct(f"<??q?dqdddqqq?{HEAD_SIZE}d")
_NO_TOTAL = (0.0,) * HEAD_SIZE
_WORD_MASK = (1 << 32) - 1
_LISTENER_CHECK_S = 0.5
"""
Interval at which a server checks whether the worker is alive and this call is still the listener.
"""

_SLICE_S = 0.05
"""Interval at which a worker checks whether the server is alive."""
_REASON_S = 5.0
"""Time limit for the open call to report why a request failed."""

CheckAlive = Callable[[], object]
"""Called twenty times a second while a reply is missing; its exceptions end the wait."""
Listen = Callable[[int, MemoryAddress, int], Any]
"""Starts the open call to a shard's server: shard, segment of mailboxes, slot."""


class MailboxRequest(NamedTuple):
    """A worker's request: a push of its gradient, or the commit of a step."""

    seq: int
    norm: float | None = None
    """2-norm of the whole gradient for a commit; None: a push."""
    task: int | None = None
    """Task of a push, if tasks are leased."""


def control_view(segment: MemorySegment, size: int) -> NDArray[np.float64]:
    """Return a view of the control record after the mailboxes of a segment, shape [size]."""
    record: NDArray[np.float64] = segment.tensor.numpy()[segment.address.elements - 8 * size :]
    return record.view(np.float64)


class Mailbox:
    """
    One mailbox, used by both worker and server.

    Args:
        segment: bytes in shared memory.
        slot: index of the mailbox in the segment.
    """

    def __init__(self, segment: MemorySegment, slot: int) -> None:
        memory = segment.tensor.numpy().data.cast("B")
        self._memory = memory[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        self._requests = Word(self._memory, _REQUESTS)
        self._replies = Word(self._memory, _REPLIES)

    def notify(self, request: MailboxRequest) -> None:
        """Send a request; the reply to the previous request must have been read."""
        is_commit = request.norm is not None  # a flag: the norm itself may be any float, NaN too
        norm = request.norm or 0.0
        task = -1 if request.task is None else request.task
        _REQUEST_LAYOUT.pack_into(self._memory, _REQUEST, request.seq, is_commit, norm, task)
        self._requests.post()

    def close(self) -> None:
        """Send no more requests; the server ends its call."""
        self._memory[_CLOSED] = 1
        self._requests.wake()

    @property
    def closed(self) -> bool:
        """Whether the worker has closed the mailbox."""
        return bool(self._memory[_CLOSED])

    def wait_reply(self, slice_s: float) -> bool:
        """Wait up to `slice_s` seconds for the reply; return whether it has arrived."""
        return self._replies.wait(self._requests.value, slice_s)

    def read(self) -> ServerReply | None:
        """Return the reply; None: the request failed, and the open call raises the reason."""
        values = _REPLY_LAYOUT.unpack_from(self._memory, _REPLY)
        succeeded, committed, version, has_norm, squared, *rest, has_total = values[:-HEAD_SIZE]
        if not succeeded:
            return None
        norm, total = squared if has_norm else None, values[-HEAD_SIZE:] if has_total else ()
        return ServerReply(version, committed, norm, *(*rest, total))

    def wait_request(self, slice_s: float) -> MailboxRequest | None:
        """Wait up to `slice_s` seconds for a request without a reply; None: timeout."""
        if not self._requests.wait(self._replies.value + 1 & _WORD_MASK, slice_s):
            return None
        seq, is_commit, norm, task = _REQUEST_LAYOUT.unpack_from(self._memory, _REQUEST)
        return MailboxRequest(seq, norm if is_commit else None, task if task >= 0 else None)

    def reply(self, result: ServerReply | None) -> None:
        """Send the reply to the current request; None: the request failed."""
        reply = result or ServerReply(0)
        norm = reply.squared_norm
        _REPLY_LAYOUT.pack_into(
            self._memory,
            _REPLY,
            result is not None,
            reply.committed,
            reply.version,
            norm is not None,
            norm or 0.0,
            reply.staleness,
            reply.waiting_s,
            reply.apply_s,
            reply.queue_s,
            reply.queue_depth,
            reply.dropped,
            reply.done,
            bool(reply.total),
            *(reply.total or _NO_TOTAL),
        )
        self._replies.post()


class Listener:
    """
    The server's side of one worker's mailbox.

    Args:
        address: the worker's segment of mailboxes.
        slot: index of this server's mailbox.
        control: number of values in the worker's control record, which follows the mailboxes.
    """

    def __init__(self, address: MemoryAddress, slot: int, control: int) -> None:
        segment = MemorySegment.open(address)
        self._mailbox, self._control = Mailbox(segment, slot), control_view(segment, control)
        self._worker = os.pidfd_open(address.pid)

    def control(self) -> NDArray[np.float64]:
        """Return a copy of the worker's control record of the current request."""
        return self._control.copy()

    def close(self) -> None:
        """Close the descriptor of the worker's process."""
        os.close(self._worker)

    def serve(
        self,
        handle: Callable[[MailboxRequest], ServerReply],
        turn: threading.Lock,
        wanted: Callable[[], bool],
    ) -> None:
        """
        Handle requests until the worker closes the mailbox or ends, or another call becomes the
        listener.

        If a call's message is lost, the worker repeats the call, and two calls may listen. Both may
        handle a request, which is harmless, but only one of them replies.

        Args:
            handle: handles one request; its exceptions end the call.
            turn: lock held while replying, and by code that changes the result of `wanted`.
            wanted: returns whether this call is still the listener.
        """
        while wanted() and not self._mailbox.closed:
            request = self._mailbox.wait_request(_LISTENER_CHECK_S)
            if request is None:
                if has_ended(self._worker):
                    return
                continue
            reply = None
            try:
                reply = handle(request)
            finally:
                with turn:
                    if wanted():
                        self._mailbox.reply(reply)


class Mailboxes:
    """
    A worker's mailboxes, one for each server that shares memory with it.

    Args:
        transport: starts the open calls.
        local_shards: shards whose servers share memory with this worker.
        names: names of all servers, by shard.
        control: number of values in this worker's control record, which follows the mailboxes.
        listen: see `Listen`.
        check_alive: see `CheckAlive`.
    """

    def __init__(
        self,
        transport: Transport,
        local_shards: set[int],
        names: Sequence[str],
        control: int,
        listen: Listen,
        check_alive: CheckAlive,
    ) -> None:
        self._transport = transport
        self.shards = sorted(local_shards) if futex.supported() else []
        self._names, self._listen, self._check_alive = names, listen, check_alive
        # Not sealed: if an open call is lost, it is repeated and opens the segment again.
        size = SLOT_BYTES * max(1, len(self.shards)) + 8 * control
        self._segment = MemorySegment.create(transport.node, size, "uint8")
        self.control = control_view(self._segment, control)  #: write it before sending a request
        self._mailboxes = {s: Mailbox(self._segment, slot) for slot, s in enumerate(self.shards)}
        self._open_calls = {shard: self._call(shard) for shard in self.shards}

    def close(self) -> None:
        """Send no more requests, and close the segment's descriptor."""
        for mailbox in self._mailboxes.values():
            mailbox.close()
        self._segment.seal()

    def notify(self, shard: int, request: MailboxRequest) -> None:
        """Send a request to a server; the reply to its previous request must have been read."""
        self._mailboxes[shard].notify(request)

    def answers(
        self, notified: Sequence[int], what: str, limit_s: float, setting: str
    ) -> Iterator[tuple[int, ServerReply]]:
        """
        Wait for replies, and yield each with its shard.

        Args:
            notified: shards to which a request was sent.
            what: description of the request, for messages.
            limit_s: timeout for all replies together.
            setting: the field of `failure` that sets the timeout.

        Raises:
            ActorLost, DeadlineExceeded: A server is lost, or does not respond.
            DistplatError: A server raised this error.
        """
        clock = AwakeClock()
        for shard in notified:
            mailbox = self._mailboxes[shard]
            while not mailbox.wait_reply(_SLICE_S):
                self._check_call(shard)
                self._check_alive()
                if clock.now() > limit_s:
                    late = [s for s in notified if not self._mailboxes[s].wait_reply(0.0)]
                    missing = tuple(self._names[s] for s in late)
                    raise DeadlineExceeded(what, missing, limit_s, f"failure.{setting}")
            reply = mailbox.read()
            if reply is None:
                self._check_call(shard, _REASON_S)
                raise ActorLost(self._names[shard], None, f"it did not report why {what} failed")
            yield shard, reply

    def _call(self, shard: int) -> Any:
        return self._listen(shard, self._segment.address, self.shards.index(shard))

    def _check_call(self, shard: int, wait_s: float = 0.0) -> None:
        """Raise the open call's exception if it has ended; repeat the call if it was lost."""
        if not self._transport.wait([self._open_calls[shard]], wait_s):
            return
        try:
            self._transport.get(self._open_calls[shard], _REASON_S)
        except Unanswered:
            logger.warning("the listen call to %s was lost, repeating it", self._names[shard])
        except ActorDied as error:
            raise ActorLost(self._names[shard], None, str(error)) from None
        self._open_calls[shard] = self._call(shard)
