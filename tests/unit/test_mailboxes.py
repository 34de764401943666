"""Mailboxes: each message is read once; a listener ends with its worker."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from distplat.actors.memory.mailboxes import SLOT_BYTES, Listener, Mailbox, MailboxRequest
from distplat.actors.memory.memfd import MemorySegment
from distplat.platform.errors import GapError
from distplat.platform.ledger import ServerReply

LIMIT_S = 60.0


@pytest.fixture
def segment() -> Iterator[MemorySegment]:
    memory = MemorySegment.create("here", 2 * SLOT_BYTES, "uint8")
    yield memory
    memory.seal()


class ListenerThread:
    """Runs a listener in a thread that records requests and replies with their number."""

    def __init__(self, segment: MemorySegment, slot: int = 0) -> None:
        self.requests: list[MailboxRequest] = []
        self.error: BaseException | None = None
        self.is_listening = True
        self.turn = threading.Lock()
        self.may_reply = threading.Event()
        self.may_reply.set()
        self._listener = Listener(segment.address, slot, 0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._listener.serve(self._handle, self.turn, lambda: self.is_listening)
        except GapError as error:
            self.error = error
        finally:
            self._listener.close()

    def _handle(self, request: MailboxRequest) -> ServerReply:
        self.requests.append(request)
        assert self.may_reply.wait(LIMIT_S)
        if request.seq < 0:
            raise GapError("no")
        return ServerReply(request.seq + 1, staleness=3, waiting_s=0.25, dropped=2)

    def end(self) -> None:
        self.is_listening = False
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()


def test_requests_and_replies_are_transferred_unchanged(segment: MemorySegment) -> None:
    listener_thread, mailbox = ListenerThread(segment, 1), Mailbox(segment, 1)
    requests = [
        MailboxRequest(0),
        MailboxRequest(1, 0.0),
        MailboxRequest(2, 2.5),
        MailboxRequest(3, math.inf),
    ]
    requests += [MailboxRequest(4, task=0), MailboxRequest(5, task=1 << 40)]
    for request in requests:
        mailbox.notify(request)
        assert mailbox.wait_reply(LIMIT_S)
        assert mailbox.read() == ServerReply(
            request.seq + 1, staleness=3, waiting_s=0.25, dropped=2
        )
    assert listener_thread.requests == requests
    listener_thread.end()


@pytest.mark.parametrize("norm", [None, 0.0, 1.5])
def test_all_fields_of_a_reply_are_transferred(segment: MemorySegment, norm: float | None) -> None:
    mailbox = Mailbox(segment, 0)
    reply = ServerReply(7, False, norm, 4, 0.5, 0.25, 0.125, 3, 6, 8)
    mailbox.notify(MailboxRequest(0))
    assert mailbox.wait_request(0.0) == MailboxRequest(0)
    mailbox.reply(reply)
    assert mailbox.read() == reply


def test_nan_norm_stays_a_commit(segment: MemorySegment) -> None:
    mailbox = Mailbox(segment, 0)
    mailbox.notify(MailboxRequest(5, math.nan))
    request = mailbox.wait_request(0.0)
    assert request is not None and request.norm is not None and math.isnan(request.norm)
    mailbox.reply(replace(ServerReply(1), squared_norm=math.nan))
    reply = mailbox.read()
    assert reply is not None and reply.squared_norm is not None
    assert math.isnan(reply.squared_norm)


def test_each_request_is_served_once(segment: MemorySegment) -> None:
    mailbox = Mailbox(segment, 0)
    assert mailbox.wait_request(0.0) is None
    mailbox.notify(MailboxRequest(0))
    assert not mailbox.wait_reply(0.0)
    mailbox.reply(ServerReply(1))
    assert mailbox.wait_reply(0.0)
    assert mailbox.wait_request(0.0) is None


def test_failed_request_ends_the_listener(segment: MemorySegment) -> None:
    listener_thread, mailbox = ListenerThread(segment), Mailbox(segment, 0)
    mailbox.notify(MailboxRequest(-1))
    assert mailbox.wait_reply(LIMIT_S)
    assert mailbox.read() is None
    listener_thread.thread.join(LIMIT_S)
    assert isinstance(listener_thread.error, GapError)


def test_second_listener_replies_once(segment: MemorySegment) -> None:
    """The message of the first call was late, not lost: both serve the request, one replies."""
    first, mailbox = ListenerThread(segment), Mailbox(segment, 0)
    first.may_reply.clear()
    mailbox.notify(MailboxRequest(0))
    deadline = time.monotonic() + LIMIT_S
    while not first.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first.requests, "the first listener has not received the request"
    with first.turn:
        first.is_listening = False
    second = ListenerThread(segment)
    assert mailbox.wait_reply(LIMIT_S)
    first.may_reply.set()
    first.end()
    assert mailbox.wait_request(0.0) is None  # not served again
    mailbox.notify(MailboxRequest(1))
    assert mailbox.wait_reply(LIMIT_S)
    assert mailbox.read() == ServerReply(2, staleness=3, waiting_s=0.25, dropped=2)
    second.end()


def test_listener_ends_with_its_worker() -> None:
    code = (
        "import os, time; from distplat.actors.memory.memfd import MemorySegment; "
        f"s = MemorySegment.create('here', {SLOT_BYTES}, 'uint8'); "
        "print(s.address.fd, flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    try:
        fd = int(worker.stdout.readline())
        segment = MemorySegment.create("here", SLOT_BYTES, "uint8")
        segment.seal()
        worker_address = replace(segment.address, pid=worker.pid, fd=fd, inode=0)
        listener = Listener(worker_address, 0, 0)
        ended = threading.Event()

        def listen() -> None:
            listener.serve(lambda request: ServerReply(0), threading.Lock(), lambda: True)
            ended.set()

        threading.Thread(target=listen, daemon=True).start()
        assert not ended.wait(0.3)
        os.kill(worker.pid, signal.SIGKILL)
        assert ended.wait(LIMIT_S)
        listener.close()
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
