"""Mailboxes: one side reads once what the other writes; a listener ends with its worker."""

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
    made = MemorySegment.create("here", 2 * SLOT_BYTES, "uint8")
    yield made
    made.seal()


class Listening:
    """A listener in a thread; requests are noted and answered by their number."""

    def __init__(self, segment: MemorySegment, slot: int = 0) -> None:
        self.seen: list[MailboxRequest] = []
        self.error: BaseException | None = None
        self.wanted = True
        self.turn = threading.Lock()
        self.hold = threading.Event()
        self.hold.set()
        self._listener = Listener(segment.address, slot, 0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._listener.serve(self._handle, self.turn, lambda: self.wanted)
        except GapError as error:
            self.error = error
        finally:
            self._listener.close()

    def _handle(self, request: MailboxRequest) -> ServerReply:
        self.seen.append(request)
        assert self.hold.wait(LIMIT_S)
        if request.seq < 0:
            raise GapError("no")
        return ServerReply(request.seq + 1, staleness=3, waiting_s=0.25, dropped=2)

    def end(self) -> None:
        self.wanted = False
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()


def test_requests_and_answers_arrive_as_they_were(segment: MemorySegment) -> None:
    listening, mailbox = Listening(segment, 1), Mailbox(segment, 1)
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
    assert listening.seen == requests
    listening.end()


@pytest.mark.parametrize("norm", [None, 0.0, 1.5])
def test_every_field_of_an_answer_travels(segment: MemorySegment, norm: float | None) -> None:
    mailbox = Mailbox(segment, 0)
    answer = ServerReply(7, False, norm, 4, 0.5, 0.25, 0.125, 3, 6, 8)
    mailbox.notify(MailboxRequest(0))
    assert mailbox.wait_request(0.0) == MailboxRequest(0)
    mailbox.reply(answer)
    assert mailbox.read() == answer


def test_a_norm_that_is_no_number_stays_a_commit(segment: MemorySegment) -> None:
    mailbox = Mailbox(segment, 0)
    mailbox.notify(MailboxRequest(5, math.nan))
    asked = mailbox.wait_request(0.0)
    assert asked is not None and asked.norm is not None and math.isnan(asked.norm)
    mailbox.reply(replace(ServerReply(1), squared_norm=math.nan))
    answer = mailbox.read()
    assert answer is not None and answer.squared_norm is not None
    assert math.isnan(answer.squared_norm)


def test_nothing_is_answered_twice_or_unasked(segment: MemorySegment) -> None:
    mailbox = Mailbox(segment, 0)
    assert mailbox.wait_request(0.0) is None
    mailbox.notify(MailboxRequest(0))
    assert not mailbox.wait_reply(0.0)
    mailbox.reply(ServerReply(1))
    assert mailbox.wait_reply(0.0)
    assert mailbox.wait_request(0.0) is None


def test_a_failed_request_ends_the_listening(segment: MemorySegment) -> None:
    listening, mailbox = Listening(segment), Mailbox(segment, 0)
    mailbox.notify(MailboxRequest(-1))
    assert mailbox.wait_reply(LIMIT_S)
    assert mailbox.read() is None
    listening.thread.join(LIMIT_S)
    assert isinstance(listening.error, GapError)


def test_of_two_listeners_the_later_answers_once(segment: MemorySegment) -> None:
    """The first call's message was late, not lost: both serve the request, one answers."""
    first, mailbox = Listening(segment), Mailbox(segment, 0)
    first.hold.clear()
    mailbox.notify(MailboxRequest(0))
    deadline = time.monotonic() + LIMIT_S
    while not first.seen and time.monotonic() < deadline:
        time.sleep(0.01)
    with first.turn:
        first.wanted = False
    second = Listening(segment)
    assert mailbox.wait_reply(LIMIT_S)
    first.hold.set()
    first.end()
    assert mailbox.wait_request(0.0) is None  # not answered once more
    mailbox.notify(MailboxRequest(1))
    assert mailbox.wait_reply(LIMIT_S)
    assert mailbox.read() == ServerReply(2, staleness=3, waiting_s=0.25, dropped=2)
    second.end()


def test_a_listener_ends_with_its_worker() -> None:
    code = (
        "import os, time; from distplat.actors.memory.memfd import MemorySegment; "
        f"s = MemorySegment.create('here', {SLOT_BYTES}, 'uint8'); "
        "print(s.address.fd, flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    try:
        fd = int(worker.stdout.readline())
        own = MemorySegment.create("here", SLOT_BYTES, "uint8")
        own.seal()
        theirs = replace(own.address, pid=worker.pid, fd=fd, inode=0)
        listener = Listener(theirs, 0, 0)
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
