"""
One worker's calls to the servers of all shards, by a mailbox where memory is shared.

A step of a server on this node is asked for through a mailbox (`memory/mailboxes.py`),
everything else by a call.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from distplat.actors.memory.mailboxes import Mailboxes, MailboxRequest
from distplat.actors.messages import Membership, MemoryAddress, WorkOrder
from distplat.actors.retrying_calls import PendingCall
from distplat.actors.transport import Transport
from distplat.platform.ledger import ServerReply
from distplat.platform.shard_map import Shard
from distplat.platform.spec import Failure

ANSWER_GRACE_S = 10.0
"""A server times out by itself and says who is missing; only a frozen one needs ours on top."""

Question = Callable[[Any, Shard], Any]
"""Calls a server about its shard; gives the reply."""
TakeAnswer = Callable[[Shard, ServerReply], None]
"""Has the values of an answer where they are wanted."""


class ServerCalls:
    """
    One worker's calls to some servers, made side by side.

    Args:
        transport: by which calls are made.
        limits: the job's deadlines.
        servers: the servers' handles.
        names: of the servers, for messages.
        look: called in waits; raises where they are of no use any more.
    """

    def __init__(
        self,
        transport: Transport,
        limits: Failure,
        servers: Sequence[Any],
        names: Sequence[str],
        look: Callable[[], None],
    ) -> None:
        self.transport, self._limits, self.look = transport, limits, look
        self.servers, self.names = servers, names

    def start(
        self,
        what: str,
        question: Callable[[Any, int], Any],
        asked: Sequence[int] | None = None,
        setting: str = "step_timeout_s",
        look: Callable[[], None] | None = None,
    ) -> PendingCall:
        """
        Begin to ask servers.

        Args:
            what: is asked, for messages.
            question: calls a server, the n-th; gives the reply.
            asked: their numbers; None: all.
            setting: the field of `failure` that changes the deadline.
            look: called in this wait instead.
        """
        numbers = range(len(self.servers)) if asked is None else asked
        calls = {self.names[n]: partial(question, self.servers[n], n) for n in numbers}
        limit_s, look = self.limit_s(setting), look or self.look
        return PendingCall(self.transport, what, calls, limit_s, setting, look)

    def each(self, method: str, *args: Any) -> Callable[[Any, Any], Any]:
        """Give a question that is the same for all servers: a call of this method."""
        return lambda server, _: self.transport.call(server, method, *args)

    def limit_s(self, setting: str) -> float:
        """Give the deadline of an answer; `setting` is the field of `failure` that changes it."""
        seconds: float = getattr(self._limits, setting)
        return seconds + ANSWER_GRACE_S


class FanOut(ServerCalls):
    """
    How a worker asks the servers of one shard map.

    Args:
        transport: see `ServerCalls`.
        order: the worker's orders.
        joined: the map, and who serves.
        look: see `ServerCalls`.
    """

    def __init__(
        self, transport: Transport, order: WorkOrder, joined: Membership, look: Callable[[], None]
    ) -> None:
        super().__init__(transport, order.job.failure, joined.servers, joined.names, look)
        self._order = order
        self.cuts = joined.shard_map.shards
        self.mailboxes: Mailboxes | None = None

    def open_mailboxes(self, local_shards: set[int], control: int) -> None:
        """
        Use mailboxes to the shards that share memory with this node.

        Args:
            local_shards: the shards.
            control: values of a control record.
        """
        self._control = control
        self.mailboxes = Mailboxes(
            self.transport, local_shards, self.names, control, self._listen, self.look
        )

    def close(self) -> None:
        """Close the mailboxes."""
        if self.mailboxes is not None:
            self.mailboxes.close()

    def ask(self, what: str, question: Question, cuts: Sequence[Shard] | None = None) -> list[Any]:
        """
        Ask the servers of some shards, by default of all; answers come in the shards' order.

        Raises:
            ActorLost, DeadlineExceeded: a server is gone, or frozen.
            DistplatError: what a server raised.
        """
        shards = [cut.index for cut in (self.cuts if cuts is None else cuts)]
        call = lambda server, index: question(server, self.cuts[index])  # noqa: E731
        return self.start(what, call, shards).answers()

    def _listen(self, shard: int, mailboxes: MemoryAddress, slot: int) -> Any:
        order, server = self._order, self.servers[shard]
        who = order.run, order.attempt, order.rank
        return self.transport.call(server, "listen", *who, mailboxes, slot, self._control)


class FanOutCall:
    """
    One question for values to the servers of all shards, to each when it is time for it.

        send([2])      send([1])    send([0]), answers()
            ├── 2 updates ── its values travel ──▶ taken at once
                           ├── 1 updates ── its values travel ──▶ taken at once

    Args:
        fan_out: to the servers.
        what: is asked, for messages.
        question: as a call.
        take: called with each answer when it comes.
        request: the same through a mailbox, to whoever has one; None: by calls alone.
        setting: the field of `failure` that changes the deadline, which counts from `answers`.
    """

    def __init__(
        self,
        fan_out: FanOut,
        what: str,
        question: Question,
        take: TakeAnswer,
        request: MailboxRequest | None = None,
        setting: str = "step_timeout_s",
    ) -> None:
        self._fan_out, self._what, self._question, self._take = fan_out, what, question, take
        self._request, self._setting = request, setting
        self._mailboxes = fan_out.mailboxes if request is not None else None
        limit_s = fan_out.limit_s(setting)
        self._asked = PendingCall(
            fan_out.transport, what, {}, limit_s, setting, fan_out.look, self._call_made
        )
        self._called: list[Shard] = []
        self._notified: list[int] = []

    def send(self, cuts: Sequence[Shard]) -> None:
        """Ask the servers of some shards; of each once."""
        for cut in cuts:
            if self._mailboxes is not None and cut.index in self._mailboxes.shards:
                assert self._request is not None, "it is what the mailboxes are for"
                self._notified.append(cut.index)
                self._mailboxes.notify(cut.index, self._request)
            else:
                self._called.append(cut)
                call = partial(self._question, self._fan_out.servers[cut.index], cut)
                self._asked.add(self._fan_out.names[cut.index], call)

    def answers(self) -> list[ServerReply]:
        """
        Wait for all answers, have each taken when it comes, and give them by shard.

        Raises:
            ActorLost, DeadlineExceeded: a server is gone, or frozen.
            DistplatError: what a server raised.
        """
        self._asked.restart_deadline()
        replies: dict[int, ServerReply] = {}
        if self._mailboxes is not None:
            limit_s = self._fan_out.limit_s(self._setting)
            arrived = self._mailboxes.answers(self._notified, self._what, limit_s, self._setting)
            for index, answer in arrived:
                self._take(self._fan_out.cuts[index], answer)
                replies[index] = answer
        for number, answer in self._asked.arrivals():
            cut = self._called[number]
            self._take(cut, answer)
            replies[cut.index] = answer
        return [replies[cut.index] for cut in self._fan_out.cuts]

    def _call_made(self, number: int, reply: Any) -> None:
        """Prefetch an answer's values to this node as soon as the answer is there."""
        self._fan_out.transport.prefetch(reply, lambda answer: answer.payload and answer.payload[0])
