"""
Calls, orders and polls that may get lost on their way: made again until an answer comes.

A transport says `Unanswered` when it does not know whether a call was carried out. Every call
that is made here may be made twice: pushes and pulls are numbered (`platform/ledger.py`), the rest
gives the same answer again. `docs/decisions/asking_again.md` says why Ray's own retries do not do.

`Orders` does the same for orders to actors: an actor may get one twice, so it must not matter. An
actor that is gone needs no orders: whoever asks how it is hears of that.

`Outbox` is the other side: what an actor tells whoever polls it, each thing once, though questions
and answers may be lost.

    asks        poll 1 ──▶      poll 2 ──▶      poll 2 ──▶      poll 3 ──▶
    is told     ◀── a, b        (lost) ── c     ◀── c           ◀── d

Questions are numbered by who asks. The same number gets the same answer; only the next one lets
go of it.
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

AGAIN_S = 0.05
"""Pause before a call is made again."""
LOOK_S = 0.1
"""How often who waits looks round."""
Call = Callable[[], Any]
"""Makes a call to an actor; gives the reply."""


class PendingCall:
    """
    Calls under way, made side by side, each of which may be made more than once.

    Args:
        transport: by which they are made.
        what: is asked, for messages.
        calls: to be made now, by the name of who is asked.
        limit_s: deadline of all of them, from now.
        setting: the field of `failure` that changes it, or an option, `--name`; empty: none does.
        look: called ten times a second while an answer is missing; what it raises ends the wait.
        made: told of each call that is made its number and its reply.
        warn: is told of calls that are made again.
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
        self.start_again()

    def add(self, name: str, call: Call) -> None:
        """Make one more call."""
        self._calls.append(call)
        self._names.append(name)
        self._open.append(self._make(len(self._open)))

    def start_again(self) -> None:
        """Restart the deadline: the wait begins now."""
        self._clock = AwakeClock()

    def wait(self) -> None:
        """Return when all have answered; see `answers`."""
        self.answers()

    def answers(self) -> list[Any]:
        """
        Wait for the answers, and give them in the order of the calls.

        Raises:
            ActorLost, DeadlineExceeded: somebody is gone, or frozen.
            DistplatError: what the other side or `look` raised.
        """
        answers = dict(self.arrivals())
        return [answers[index] for index in range(len(self._calls))]

    def arrivals(self) -> Iterator[tuple[int, Any]]:
        """
        Wait for the answers, and give each when it comes, with the number of its call.

        Raises:
            ActorLost, DeadlineExceeded, DistplatError: see `answers`.
        """
        missing = list(range(len(self._calls)))
        while missing:
            left = max(0.0, self._limit_s - self._clock.now())
            calls = [self._open[index] for index in missing]
            arrived = self._transport.wait(calls, min(left, LOOK_S))
            if not arrived:
                self._check(missing[0], left)
                continue
            index = missing[calls.index(arrived[0])]
            try:
                answer = self._transport.get(arrived[0], left)
            except AnswerPending:  # large, still on its way: `get` has waited until the deadline
                self._check(index, 0.0)
            except Unanswered:
                self._check(index, left)
                self._warn(f"{self._what}: no answer from {self._names[index]}, asking again")
                time.sleep(AGAIN_S)
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
        """Raise where `look` ends the wait, or the deadline has passed."""
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
    """Make calls side by side, and wait for their answers; see `PendingCall`."""
    return PendingCall(transport, what, calls, limit_s, setting, look, warn=warn).answers()


Item = TypeVar("Item")


class Outbox(Generic[Item]):
    """
    Queue of items for one reader that polls; any thread may add to it.

    Args:
        most: while so many wait to be told, what `spare` says yes to is counted, not kept.
        spare: whether a thing may be left out; by default none may.
    """

    def __init__(self, most: int = 0, spare: Callable[[Item], bool] = lambda item: False) -> None:
        self._most, self._spare, self._left_out = most, spare, 0
        self._changed = threading.Condition()
        self._fresh: deque[Item] = deque()
        self._last: list[Item] = []  #: the answer to the last question
        self._number = 0  #: of that
        self._closed = False

    def put(self, item: Item) -> None:
        """Queue an item for the reader."""
        with self._changed:
            if len(self._fresh) >= self._most and self._spare(item):
                self._left_out += 1
                return
            self._fresh.append(item)
            self._changed.notify_all()

    def left_out(self) -> int:
        """Give the number of items that were dropped since the last call."""
        with self._changed:
            count, self._left_out = self._left_out, 0
            return count

    def close(self) -> None:
        """Say that no more items will come, and wake waiting polls."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def drained(self) -> bool:
        """Whether it is closed and every item was handed out."""
        with self._changed:
            return self._closed and not self._fresh

    @property
    def waiting(self) -> bool:
        """Whether there is something to tell that no answer has had so far."""
        with self._changed:
            return bool(self._fresh)

    def take(self, number: int, hold_s: float = 0.0) -> list[Item]:
        """
        Answer a question; one that came late, after the next one, gets nothing.

        Args:
            number: of the question, from 1.
            hold_s: how long to wait for something to tell.
        """
        answerable = lambda: self._fresh or self._closed or number <= self._number  # noqa: E731
        with self._changed:
            self._changed.wait_for(answerable, hold_s)
            if number > self._number:
                self._number, self._last = number, list(self._fresh)
                self._fresh.clear()
            return list(self._last) if number == self._number else []


_FETCH_S = 5.0
"""How long an answer that is here may take to be read."""


@dataclass
class _Order:
    role: str
    call: Callable[[], Any]
    reply: Any


class Orders:
    """
    Orders that were given and are not known to be carried out.

    Args:
        transport: by which they are given.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._open: list[_Order] = []

    def give(self, role: str, actor: Any, method: str, *args: Any) -> None:
        """Call an actor's method, which answers when it is carried out."""
        call = partial(self._transport.call, actor, method, *args)
        self._open.append(_Order(role, call, call()))

    def look(self) -> list[tuple[str, DistplatError]]:
        """Give those again that were lost; give the roles that could not carry one out, and why."""
        replies = [order.reply for order in self._open]
        arrived = self._transport.wait(replies, 0.0, everything=True) if replies else []
        failed: list[tuple[str, DistplatError]] = []
        for order in [one for one in self._open if one.reply in arrived]:
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
