"""
Calls, orders and polls that are retried until an answer arrives.

A transport raises `Unanswered` when it does not know whether a call was executed. All calls of this
module are idempotent, so that they can be repeated: pushes and pulls are numbered
(`platform/ledger.py`), other calls return the same answer again. `docs/decisions/asking_again.md`
explains why Ray's own retries are not enough.

`Orders` retries orders to actors: calls without an answer that matters. Orders to a dead actor are
dropped, because the controller's polls report its death.

`Outbox` is the sending side of a poll: each item is delivered exactly once, although polls and
answers may be lost.

    reader      poll 1 ──▶      poll 2 ──▶      poll 2 ──▶      poll 3 ──▶
    outbox      ◀── a, b        (lost) ── c     ◀── c           ◀── d

The reader numbers its polls. A repeated number gets the same answer again; the next number
releases it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from distplat.actors.transport import ActorDied, AnswerPending, Transport, Unanswered
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import ActorLost, DeadlineExceeded, DistplatError

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.05
"""Pause before a retry."""
POLL_S = 0.1
"""Interval of `check` while answers are missing."""
Call = Callable[[], Any]
"""Calls an actor and returns the reply."""


class PendingCall:
    """
    Concurrent calls, each of which is retried until it is answered.

    Args:
        transport: transport of the calls.
        what: description of the calls, for messages.
        calls: by the name of the called actor; sent immediately.
        limit_s: common deadline, in seconds from now.
        setting: field of `failure`, or option `--name`, with the deadline; empty: fixed deadline.
        look: called every `POLL_S` while an answer is missing; an exception ends the wait.
        made: called with number and reply of each call that is sent.
        warn: called with a message about each retry.
    """

    def __init__(
        self,
        transport: Transport,
        what: str,
        calls: Mapping[str, Call],
        limit_s: float,
        setting: str,
        look: Callable[[], object] | None,
        made: Callable[[int, Any], object] = lambda number, reply: None,
        warn: Callable[[str], object] = logger.warning,
    ) -> None:
        self._transport = transport
        self._what, self._limit_s, self._setting = what, limit_s, setting
        self._look, self._made, self._warn = look, made, warn
        self._calls: list[Call] = []
        self._names: list[str] = []
        self._open: list[Any] = []
        for name, call in calls.items():
            self.add(name, call)
        self.restart_deadline()

    def add(self, name: str, call: Call) -> None:
        """Send another call."""
        self._calls.append(call)
        self._names.append(name)
        self._open.append(self._make(len(self._open)))

    def restart_deadline(self) -> None:
        """Restart the deadline."""
        self._clock = AwakeClock()

    def wait(self) -> None:
        """Wait for all answers; see `answers`."""
        self.answers()

    def answers(self) -> list[Any]:
        """
        Wait for all answers and return them in the order of the calls.

        Raises:
            ActorLost: an actor died.
            DeadlineExceeded: an actor did not answer.
            DistplatError: raised by an actor, or by `look`.
        """
        answers = dict(self.arrivals())
        return [answers[index] for index in range(len(self._calls))]

    def arrivals(self) -> Iterator[tuple[int, Any]]:
        """
        Yield each answer as it arrives, with the number of its call.

        Raises:
            ActorLost, DeadlineExceeded, DistplatError: see `answers`.
        """
        missing = list(range(len(self._calls)))
        while missing:
            left = max(0.0, self._limit_s - self._clock.now())
            calls = [self._open[index] for index in missing]
            arrived = self._transport.wait(calls, min(left, POLL_S))
            if not arrived:
                self._check(missing[0], left)
                continue
            index = missing[calls.index(arrived[0])]
            try:
                answer = self._transport.get(arrived[0], left)
            except AnswerPending:  # a large answer is in transfer: `get` waited until the deadline
                self._check(index, 0.0)
            except Unanswered:
                self._check(index, left)
                self._warn(f"{self._what}: no answer from {self._names[index]}, asking again")
                time.sleep(RETRY_PAUSE_S)
                self._open[index] = self._make(index)
            except ActorDied as error:
                raise ActorLost(self._names[index], None, str(error)) from None
            else:
                missing.remove(index)
                yield index, answer

    def _make(self, index: int) -> Any:
        reply = self._calls[index]()
        self._made(index, reply)
        return reply

    def _check(self, index: int, left: float) -> None:
        """Raise if `look` ends the wait or the deadline has passed."""
        if self._look is not None:
            self._look()
        if not left:
            arrived = self._transport.wait(self._open, 0.0, everything=True)
            unanswered = [number for number, call in enumerate(self._open) if call not in arrived]
            missing = tuple(self._names[number] for number in unanswered or [index])
            of_job = self._setting and not self._setting.startswith("--")
            setting = f"failure.{self._setting}" if of_job else self._setting
            raise DeadlineExceeded(self._what, missing, self._limit_s, setting) from None


def ask(
    transport: Transport,
    what: str,
    calls: Mapping[str, Call],
    limit_s: float,
    setting: str,
    look: Callable[[], object] | None = None,
    warn: Callable[[str], object] = logger.warning,
) -> list[Any]:
    """Send concurrent calls and wait for their answers; see `PendingCall`."""
    return PendingCall(transport, what, calls, limit_s, setting, look, warn=warn).answers()


Item = TypeVar("Item")


class Outbox(Generic[Item]):
    """
    Queue of items for one reader that polls; any thread may add items.

    Args:
        max_items: from this length on, droppable items are counted instead of queued.
        droppable: whether an item may be dropped; by default no item is.
    """

    def __init__(
        self, max_items: int = 0, droppable: Callable[[Item], bool] = lambda item: False
    ) -> None:
        self._max_items, self._droppable, self._dropped = max_items, droppable, 0
        self._changed = threading.Condition()
        self._fresh: deque[Item] = deque()
        self._last: list[Item] = []  #: answer to the last poll
        self._number = 0  #: number of the last poll
        self._closed = False

    def put(self, item: Item) -> None:
        """Queue an item for the reader."""
        with self._changed:
            if len(self._fresh) >= self._max_items and self._droppable(item):
                self._dropped += 1
                return
            self._fresh.append(item)
            self._changed.notify_all()

    def pop_dropped(self) -> int:
        """Return the number of items that were dropped since the last call."""
        with self._changed:
            count, self._dropped = self._dropped, 0
            return count

    def close(self) -> None:
        """Accept no more items, and wake waiting polls."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def drained(self) -> bool:
        """Whether the outbox is closed and every item was delivered."""
        with self._changed:
            return self._closed and not self._fresh

    @property
    def waiting(self) -> bool:
        """Whether an item is queued that was in no answer yet."""
        with self._changed:
            return bool(self._fresh)

    def take(self, number: int, hold_s: float = 0.0) -> list[Item]:
        """
        Return the answer to a poll; a stale poll, older than the last one, gets an empty list.

        Args:
            number: number of the poll, from 1.
            hold_s: seconds to wait for an item.
        """
        answerable = lambda: self._fresh or self._closed or number <= self._number  # noqa: E731
        with self._changed:
            self._changed.wait_for(answerable, hold_s)
            if number > self._number:
                self._number, self._last = number, list(self._fresh)
                self._fresh.clear()
            return list(self._last) if number == self._number else []


_FETCH_S = 5.0
"""Timeout for reading an answer that has arrived."""


@dataclass
class _Order:
    role: str
    call: Callable[[], Any]
    reply: Any


class Orders:
    """
    Orders that are sent but not confirmed yet.

    Args:
        transport: transport of the orders.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._open: list[_Order] = []

    def send(self, role: str, actor: Any, method: str, *args: Any) -> None:
        """Send an order: call a method of an actor, which answers once the order is executed."""
        call = partial(self._transport.call, actor, method, *args)
        self._open.append(_Order(role, call, call()))

    def poll(self) -> list[tuple[str, DistplatError]]:
        """Repeat lost orders; return the roles whose orders failed, with the errors."""
        replies = [order.reply for order in self._open]
        arrived = self._transport.wait(replies, 0.0, everything=True) if replies else []
        failed: list[tuple[str, DistplatError]] = []
        for order in [order for order in self._open if order.reply in arrived]:
            try:
                self._transport.get(order.reply, _FETCH_S)
            except (Unanswered, AnswerPending):
                order.reply = order.call()
                continue
            except ActorDied:
                pass
            except DistplatError as error:
                failed.append((order.role, error))
            self._open.remove(order)
        return failed
