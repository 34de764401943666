"""
One rank's connections in a gloo group: order, comparison, deadlines, and who is to blame.

    start(header, begin)                                          wait()
      count -> compare headers (the first ones) -> gloo begins      gloo ends -> account
                        |                                              |
                        v differ: MismatchError                        v fails: cut, look, name
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from distplat.actors.collective.gloo_store import Store, unless_told_to_give_up
from distplat.actors.collective.group import Settings
from distplat.actors.collective.header import LENGTH, Header, differences, header
from distplat.actors.collective.pulse import Pulse
from distplat.actors.collective.underway import Accounts, Underway
from distplat.platform.errors import CollectiveError, MismatchError
from distplat.strategies.collective import Traffic

COMPARED = 20
"""So many operations of a group are compared between the ranks without `debug`."""

_PAYLOAD, _HEADER, _NOBODY = 0, 1, 2**31 - 1
"""Tags of messages; nobody sends with the last one."""

_GIVEN_UP = "this rank was told to give up"


class Link:
    """
    What a gloo group's operations go through.

    Args:
        name: of the group.
        rank: place in it.
        world: ranks in it.
        settings: the group's.
        traffic: where operations are accounted.

    Raises:
        DeadlineExceeded: somebody did not come in `rendezvous_s`.
        CollectiveError: the group broke while it formed, or this rank was told to give up.
    """

    def __init__(
        self, name: str, rank: int, world: int, settings: Settings, traffic: Traffic
    ) -> None:
        self._name, self._rank, self._world = name, rank, world
        self._settings, self.accounts = settings, Accounts(traffic)
        self._begun = 0  #: operations of all ranks
        self._messages: dict[tuple[str, int], int] = {}
        self._failure: tuple[tuple[int, ...], str] | None = None
        self._aborted = False
        # Gloo matches operations by their order: a thread must count and begin in one go.
        self._order, self._looking = threading.RLock(), threading.Lock()
        self._connections: list[tuple[Any, int, int]] = []
        self._store = unless_told_to_give_up(self._form, name, settings)
        self._pulse = Pulse(self._store.client, rank, world, lambda: self._begun, self._watch)

    def _form(self) -> Store:
        store = Store(self._name, self._rank, self._world, self._settings)
        self._connections.append(self._connect(store, "all", self._rank, self._world))
        return store

    def _connect(self, store: Store, purpose: str, place: int, places: int) -> tuple[Any, int, int]:
        try:
            return store.connect(purpose, place, places), place, places
        except RuntimeError as error:
            cause = f"gloo says: {str(error).splitlines()[0]}"
            raise CollectiveError(self._name, "rendezvous", 0, (), cause) from None

    def connect_some(self, purpose: str, place: int, places: int) -> Any:
        """Connect some of the ranks apart from the others (see `Store.connect`)."""

        def connect() -> tuple[Any, int, int]:
            return self._connect(self._store, purpose, place, places)

        made = unless_told_to_give_up(connect, self._name, self._settings)
        self._connections.append(made)
        return made[0]

    def start(
        self,
        head: Header,
        begin: Callable[[Any], Sequence[Any]],
        moved: tuple[int, int] = (0, 0),
        after: Callable[[], None] = lambda: None,
    ) -> Underway:
        """
        Begin an operation of all ranks.

        Args:
            head: what it is.
            begin: takes the process group, gives the works to wait for.
            moved: bytes that this rank (sends, receives).
            after: to be done when the works are over.

        Raises:
            CollectiveError: see `Collective`.
        """
        with self._order:
            number = self.enter(head)
            fail = partial(self.failed, head.name, number=number)
            try:
                works = begin(self._connections[0][0])
            except RuntimeError as error:
                raise fail(error) from None
            return Underway(works, self.accounts, fail, moved, after)

    def enter(self, head: Header) -> int:
        """Count an operation of all ranks, compare it with theirs if it is time; its number."""
        with self._order:
            self._begun += 1
            number = self._begun
            self._refuse_if_broken(head.name, number)
            if self._world > 1 and (self._settings.debug or number <= COMPARED):
                self._compare(head._replace(number=number))
            return number

    def _compare(self, head: Header) -> None:
        table = torch.empty(self._world * LENGTH, dtype=torch.int64)
        try:
            with self.accounts.waiting():
                self._connections[0][0]._allgather_base(table, torch.tensor(head)).wait()
        except RuntimeError as error:
            raise self.failed(head.name, error, number=head.number) from None
        headers = [Header(*row) for row in table.view(self._world, LENGTH).tolist()]
        differ, text = differences(headers)
        if differ:
            raise MismatchError(self._name, head.name, head.number, differ, text)

    def start_send(self, tensor: Tensor, to: int) -> Underway:
        """Begin to send to one rank; over when it has come for it."""
        number, compare = self._count_message("send", to)
        fail = partial(self.failed, "send", number=number, partner=to)
        group = self._connections[0][0]
        works = []
        try:
            if compare:
                works.append(group.send([torch.tensor(_kind(tensor, number))], to, _HEADER))
            if tensor.numel():
                works.append(group.send([tensor], to, _PAYLOAD))
        except RuntimeError as error:
            raise fail(error) from None
        return Underway(works, self.accounts, fail, (tensor.nbytes, 0))

    def recv(self, tensor: Tensor, source: int) -> None:
        """Receive from one rank."""
        number, compare = self._count_message("recv", source)
        fail = partial(self.failed, "recv", number=number, partner=source)
        group = self._connections[0][0]
        try:
            if compare:
                self._compare_message(group, tensor, source, number)
            works = [group.recv([tensor], source, _PAYLOAD)] if tensor.numel() else []
        except RuntimeError as error:
            raise fail(error) from None
        Underway(works, self.accounts, fail, (0, tensor.nbytes)).wait()

    def _count_message(self, operation: str, partner: int) -> tuple[int, bool]:
        number = self._messages.get((operation, partner), 0) + 1
        self._messages[operation, partner] = number
        self._refuse_if_broken(operation, number)
        return number, self._settings.debug or number <= COMPARED

    def _compare_message(self, group: Any, tensor: Tensor, source: int, number: int) -> None:
        mine = _kind(tensor, number)
        theirs = torch.empty(LENGTH, dtype=torch.int64)
        with self.accounts.waiting():
            group.recv([theirs], source, _HEADER).wait()
        sent = Header(*theirs.tolist())
        if sent != mine:
            self.cut()  # the sender waits for somebody to take its message
            text = f"rank {source} sends {sent.what}; rank {self._rank} expects {mine.what}"
            raise MismatchError(self._name, "recv", number, (source,), text)

    def failed(
        self, operation: str, error: Exception, *, number: int, partner: int | None = None
    ) -> CollectiveError:
        """Find out who is missing, once for all that is under way, and say it."""
        with self._looking:
            if self._failure is None:
                self.cut()  # nobody shall wait for this rank
                missing = self._pulse.missing(number, partner, lambda: self.given_up)
                why = f"gloo says: {str(error).splitlines()[0]}"
                if isinstance(error, CollectiveError):  # of a group inside this one
                    why = error.cause
                cause = f"deadline {self._settings.operation_s:g} s; {why}"
                self._failure = ((), _GIVEN_UP) if self.given_up else (missing, cause)
        missing, cause = self._failure
        return CollectiveError(self._name, operation, number, missing, cause)

    @property
    def given_up(self) -> bool:
        """Whether this rank was told that nobody wants the group any more."""
        return self._aborted or self._settings.abandoned.is_set()

    def abort(self) -> None:
        """Make whoever waits here fail; from any thread."""
        self._aborted = True
        self.cut()

    def cut(self) -> None:
        """
        Break all connections, so that this rank's operations and those of its peers end.

        `ProcessGroupGloo.abort` leaves them waiting. But gloo breaks all pairs of a context when
        one operation in it times out, so one that nobody answers is given a millisecond.
        """
        for group, place, places in list(self._connections):
            for peer in (other for other in range(places) if other != place):
                with suppress(RuntimeError):
                    nothing = group.recv([torch.empty(1)], peer, _NOBODY)
                    nothing.wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Leave; what is under way ends."""
        troubled = bool(self.accounts.under_way or self._failure or self.given_up)
        if troubled:
            self.cut()
        self._pulse.stop()
        self._failure = self._failure or ((), "this rank has left the group")
        self._connections.clear()
        self._store.close(troubled=troubled)

    def _refuse_if_broken(self, operation: str, number: int) -> None:
        if self._failure is None and self.given_up:
            self._failure = ((), _GIVEN_UP)
        if self._failure is not None:
            missing, cause = self._failure
            raise CollectiveError(self._name, operation, number, missing, cause)

    def _watch(self) -> None:
        if self.given_up:
            self.cut()


def _kind(tensor: Tensor, number: int) -> Header:
    return header("send", [tensor], number=number)
