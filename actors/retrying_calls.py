"""
Calls to the server group whose answer may get lost on its way: asked again until one comes.

A transport says `Unanswered` when it does not know whether a call was carried out. Every call
that is made here may be made twice: pushes and pulls are numbered (`platform/ledger.py`), the rest
gives the same answer again. `docs/decisions/asking_again.md` says why Ray's own retries do not do.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distplat.actors.transport import ActorDied, NotHere, Transport, Unanswered
from distplat.platform.errors import ActorLost, DeadlineExceeded

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
        calls: to be made now.
        names: of who is asked, one for each call.
        limit_s: deadline of all of them, from now.
        setting: the field of `failure` that changes it; empty: none does.
        look: called ten times a second while an answer is missing; what it raises ends the wait.
        made: told of each call that is made its number and its reply.
    """

    def __init__(
        self,
        transport: Transport,
        what: str,
        calls: Sequence[Call],
        names: Sequence[str],
        limit_s: float,
        setting: str,
        look: Callable[[], object] | None = None,
        made: Callable[[int, Any], object] = lambda number, reply: None,
    ) -> None:
        self._transport = transport
        self._what, self._limit_s, self._setting = what, limit_s, setting
        self._look, self._made = look, made
        self._calls: list[Call] = []
        self._names: list[str] = []
        self._open: list[Any] = []
        for call, name in zip(calls, names, strict=True):
            self.add(call, name)
        self.start_again()

    def add(self, call: Call, name: str) -> None:
        """Make one more call."""
        self._calls.append(call)
        self._names.append(name)
        self._open.append(self._make(len(self._open)))

    def start_again(self) -> None:
        """Have the deadline count from now: only now somebody waits."""
        self._until = time.monotonic() + self._limit_s

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
        found = dict(self.arrivals())
        return [found[index] for index in range(len(self._calls))]

    def arrivals(self) -> Iterator[tuple[int, Any]]:
        """
        Wait for the answers, and give each when it comes, with the number of its call.

        Raises:
            ActorLost, DeadlineExceeded, DistplatError: see `answers`.
        """
        missing = list(range(len(self._calls)))
        while missing:
            left = max(0.0, self._until - time.monotonic())
            calls = [self._open[index] for index in missing]
            come = self._transport.wait(calls, min(left, LOOK_S) if self._look else left)
            if not come:
                self._check(missing[0])
                continue
            index = missing[calls.index(come[0])]
            try:
                answer = self._transport.get(come[0], left)
            except NotHere:  # it is large, and still on its way
                self._check(index)
            except Unanswered:
                self._check(index)
                logger.warning(
                    "%s: no answer from %s, asking again", self._what, self._names[index]
                )
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

    def _check(self, index: int) -> None:
        """Give up where nobody wants the answers any more, or it is too late."""
        if self._look is not None:
            self._look()
        if time.monotonic() >= self._until:
            here = self._transport.wait(self._open, 0.0, everything=True)
            late = [number for number, call in enumerate(self._open) if call not in here]
            missing = tuple(self._names[number] for number in late or [index])
            setting = f"failure.{self._setting}" if self._setting else ""
            raise DeadlineExceeded(self._what, missing, self._limit_s, setting) from None


def ask(
    transport: Transport,
    what: str,
    calls: Sequence[Call],
    names: Sequence[str],
    limit_s: float,
    setting: str,
    look: Callable[[], object] | None = None,
) -> list[Any]:
    """Make calls side by side, and wait for their answers; see `PendingCall`."""
    return PendingCall(transport, what, calls, names, limit_s, setting, look).answers()
