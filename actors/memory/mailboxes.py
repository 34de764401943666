"""
Mailboxes between a worker and the server nodes of its node: a step's control without a call of Ray.

    worker                          shared memory                server node, a thread per worker
    write the request, post   ──▶   asked    + 1   ──▶           wake, serve it as if by a call
    wake, read the answer     ◀──   answered + 1   ◀──           write the answer, post

    `listen`: a call that stays open as long as the mailbox is used. It ends with an exception when
    the server dies, and when a request failed: that is where errors come from.

A call of Ray costs about a millisecond on a busy machine, a futex a few hundredths of one. What a
request does is the same either way, and so is what decides on it: the shard's ledger.
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
"""Bytes of one mailbox; the two sides write to cache lines of their own."""
_ASKED, _REQUEST, _CLOSED, _ANSWERED, _ANSWER = 0, 8, 64, 128, 136
_REQUEST_LAYOUT = struct.Struct("<q?dq")
_ANSWER_LAYOUT = struct.Struct(f"<??q?dqdddqqq?{HEAD_SIZE}d")
_NO_TOTAL = (0.0,) * HEAD_SIZE
_ALL = (1 << 32) - 1
_LOOK_S = 0.5
"""How often a server looks whether the worker lives and is still to be listened to."""

_SLICE_S = 0.05
"""How often who waits for an answer looks whether the server lives."""
_REASON_S = 5.0
"""How long a standing call may take to say why a request failed."""

Look = Callable[[], object]
"""Called twenty times a second while an answer is missing; what it raises ends the wait."""
Listen = Callable[[int, MemoryAddress, int], Any]
"""Makes the standing call to the server of a shard: shard, segment of mailboxes, slot."""


class MailboxRequest(NamedTuple):
    """What a worker asks for: a push of its gradient, or the commit of a step."""

    seq: int
    norm: float | None = None
    """2-norm of the whole gradient, if this is a commit; None: this is a push."""
    task: int | None = None
    """What a push is of, where tasks are leased."""


def control_of(segment: MemorySegment, size: int) -> NDArray[np.float64]:
    """View the control record behind the mailboxes of a segment, shape [size]."""
    record: NDArray[np.float64] = segment.tensor.numpy()[segment.address.elements - 8 * size :]
    return record.view(np.float64)


class Mailbox:
    """
    One mailbox, as either side sees it.

    Args:
        segment: bytes in shared memory.
        slot: which mailbox in it, from 0.
    """

    def __init__(self, segment: MemorySegment, slot: int) -> None:
        memory = segment.tensor.numpy().data.cast("B")
        self._memory = memory[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        self._asked = Word(self._memory, _ASKED)
        self._answered = Word(self._memory, _ANSWERED)

    def notify(self, request: MailboxRequest) -> None:
        """Send a request; the answer to the request before has been read."""
        is_commit = request.norm is not None  # a flag: the norm itself may be any float, NaN too
        norm = request.norm or 0.0
        task = -1 if request.task is None else request.task
        _REQUEST_LAYOUT.pack_into(self._memory, _REQUEST, request.seq, is_commit, norm, task)
        self._asked.post()

    def close(self) -> None:
        """Send no more; the other side ends its call."""
        self._memory[_CLOSED] = 1
        self._asked.wake()

    @property
    def closed(self) -> bool:
        """Whether the worker sends no more requests."""
        return bool(self._memory[_CLOSED])

    def answered(self, slice_s: float) -> bool:
        """Wait at most `slice_s` seconds for the answer; return whether it is there."""
        return self._answered.wait(self._asked.value, slice_s)

    def read(self) -> ServerReply | None:
        """Give the answer that is there; None: the request failed, the standing call says why."""
        values = _ANSWER_LAYOUT.unpack_from(self._memory, _ANSWER)
        succeeded, committed, version, has_norm, squared, *rest, has_total = values[:-HEAD_SIZE]
        if not succeeded:
            return None
        norm, total = squared if has_norm else None, values[-HEAD_SIZE:] if has_total else ()
        return ServerReply(version, committed, norm, *(*rest, total))

    def asked(self, slice_s: float) -> MailboxRequest | None:
        """Wait at most `slice_s` seconds for a request that is not answered yet."""
        if not self._asked.wait(self._answered.value + 1 & _ALL, slice_s):
            return None
        seq, is_commit, norm, task = _REQUEST_LAYOUT.unpack_from(self._memory, _REQUEST)
        return MailboxRequest(seq, norm if is_commit else None, task if task >= 0 else None)

    def answer(self, answer: ServerReply | None) -> None:
        """Answer the present request; None: it failed."""
        reply = answer or ServerReply(0)
        norm = reply.squared_norm
        _ANSWER_LAYOUT.pack_into(
            self._memory,
            _ANSWER,
            answer is not None,
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
        self._answered.post()


class Listener:
    """
    The server's side of one worker's mailbox.

    Args:
        address: the worker's segment of mailboxes.
        slot: which of them is this server's.
        control: values of the worker's control record, behind the mailboxes.
    """

    def __init__(self, address: MemoryAddress, slot: int, control: int) -> None:
        segment = MemorySegment.open(address)
        self._mailbox, self._control = Mailbox(segment, slot), control_of(segment, control)
        self._worker = os.pidfd_open(address.pid)

    def control(self) -> NDArray[np.float64]:
        """Give a copy of the worker's control record, of the request that is being served."""
        return self._control.copy()

    def close(self) -> None:
        """Let go of the worker's process."""
        os.close(self._worker)

    def serve(
        self,
        handle: Callable[[MailboxRequest], ServerReply],
        turn: threading.Lock,
        wanted: Callable[[], bool],
    ) -> None:
        """
        Answer requests until the worker closes it or ends, or another call listens to it.

        A call whose message got lost is made again, and then two may be here: both may serve a
        request, which is harmless, but only one answers.

        Args:
            handle: serves one request; its exception ends the listening.
            turn: held to answer, and by whoever changes what `wanted` says.
            wanted: whether this is the call that listens.
        """
        while wanted() and not self._mailbox.closed:
            request = self._mailbox.asked(_LOOK_S)
            if request is None:
                if has_ended(self._worker):
                    return
                continue
            answer = None
            try:
                answer = handle(request)
            finally:
                with turn:
                    if wanted():
                        self._mailbox.answer(answer)


class Mailboxes:
    """
    A worker's mailboxes, one for each server node that shares memory with it.

    Args:
        transport: by which standing calls are made.
        local_shards: shards whose servers share memory with this worker.
        names: of all servers, by shard.
        control: values of this worker's control record, which lies behind the mailboxes.
        listen: makes a standing call.
        look: see `Look`.
    """

    def __init__(
        self,
        transport: Transport,
        local_shards: set[int],
        names: Sequence[str],
        control: int,
        listen: Listen,
        look: Look,
    ) -> None:
        self._transport = transport
        self.shards = sorted(local_shards) if futex.supported() else []
        self._names, self._listen, self._look = names, listen, look
        # Not sealed: a standing call that got lost is made again, and opens it again.
        size = SLOT_BYTES * max(1, len(self.shards)) + 8 * control
        self._segment = MemorySegment.create(transport.node, size, "uint8")
        self.control = control_of(self._segment, control)  #: written before a request is sent
        self._mailboxes = {s: Mailbox(self._segment, slot) for slot, s in enumerate(self.shards)}
        self._standing = {shard: self._call(shard) for shard in self.shards}

    def close(self) -> None:
        """Send no more, and give the memory back."""
        for mailbox in self._mailboxes.values():
            mailbox.close()
        self._segment.seal()

    def notify(self, shard: int, request: MailboxRequest) -> None:
        """Send one of them a request; its answer to the request before has been read."""
        self._mailboxes[shard].notify(request)

    def answers(
        self, notified: Sequence[int], what: str, limit_s: float, setting: str
    ) -> Iterator[tuple[int, ServerReply]]:
        """
        Wait for answers, and give one after the other.

        Args:
            notified: shards that were asked.
            what: was asked, for messages.
            limit_s: deadline of all of them.
            setting: the field of `failure` that changes it.

        Raises:
            ActorLost, DeadlineExceeded: a server is gone, or frozen.
            DistplatError: what a server raised.
        """
        clock = AwakeClock()
        for shard in notified:
            mailbox = self._mailboxes[shard]
            while not mailbox.answered(_SLICE_S):
                self._look_after(shard)
                self._look()
                if clock.now() > limit_s:
                    late = [one for one in notified if not self._mailboxes[one].answered(0.0)]
                    missing = tuple(self._names[s] for s in late)
                    raise DeadlineExceeded(what, missing, limit_s, f"failure.{setting}")
            answer = mailbox.read()
            if answer is None:
                self._look_after(shard, _REASON_S)
                raise ActorLost(self._names[shard], None, f"it could not say why {what} failed")
            yield shard, answer

    def _call(self, shard: int) -> Any:
        return self._listen(shard, self._segment.address, self.shards.index(shard))

    def _look_after(self, shard: int, wait_s: float = 0.0) -> None:
        """Raise what the standing call says, if it has ended; make it again if it got lost."""
        if not self._transport.wait([self._standing[shard]], wait_s):
            return
        try:
            self._transport.get(self._standing[shard], _REASON_S)
        except Unanswered:
            logger.warning("no word from %s, asking it again to listen", self._names[shard])
        except ActorDied as error:
            raise ActorLost(self._names[shard], None, str(error)) from None
        self._standing[shard] = self._call(shard)
