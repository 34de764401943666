"""
A worker's calls to the servers of all shards.

Pushes and commits to a server on the same node go through a mailbox (`memory/mailboxes.py`), all
other requests through actor calls.
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
"""Added to a server's own deadline, so that the server's error, which names ranks, comes first."""

ShardCall = Callable[[Any, Shard], Any]
"""Calls the server of a shard; returns the reply."""
ReceiveAnswer = Callable[[Shard, ServerReply], None]
"""Copies the values of an answer to their destination."""


class ServerCalls:
    """
    A worker's concurrent calls to several servers.

    Args:
        transport: the worker's.
        limits: the job's deadlines.
        servers: the servers' handles.
        names: of the servers, for messages.
        check: called repeatedly during waits; raises if the wait cannot succeed any more.
    """

    def __init__(
        self,
        transport: Transport,
        limits: Failure,
        servers: Sequence[Any],
        names: Sequence[str],
        check: Callable[[], None],
    ) -> None:
        self.transport, self._limits, self.check = transport, limits, check
        self.servers, self.names = servers, names

    def start(
        self,
        what: str,
        call: Callable[[Any, int], Any],
        indices: Sequence[int] | None = None,
        setting: str = "step_timeout_s",
        check: Callable[[], None] | None = None,
    ) -> PendingCall:
        """
        Start a call to several servers.

        Args:
            what: name of the call, for messages.
            call: calls a server, given its handle and index; returns the reply.
            indices: of the servers to call; None: all.
            setting: the field of `failure` that changes the deadline.
            check: replaces the constructor's `check` for this wait.
        """
        indices = range(len(self.servers)) if indices is None else indices
        calls = {self.names[n]: partial(call, self.servers[n], n) for n in indices}
        limit_s, check = self.limit_s(setting), check or self.check
        return PendingCall(self.transport, what, calls, limit_s, setting, check)

    def each(self, method: str, *args: Any) -> Callable[[Any, Any], Any]:
        """Return a function that calls this method with these arguments on any server."""
        return lambda server, _: self.transport.call(server, method, *args)

    def limit_s(self, setting: str) -> float:
        """Return the deadline of an answer; `setting` is the field of `failure` that changes it."""
        seconds: float = getattr(self._limits, setting)
        return seconds + ANSWER_GRACE_S


class FanOut(ServerCalls):
    """
    A worker's calls to the servers of one shard map.

    Args:
        transport: see `ServerCalls`.
        order: the worker's orders.
        joined: the shard map and its servers.
        check: see `ServerCalls`.
    """

    def __init__(
        self, transport: Transport, order: WorkOrder, joined: Membership, check: Callable[[], None]
    ) -> None:
        super().__init__(transport, order.job.failure, joined.servers, joined.names, check)
        self._order = order
        self.cuts = joined.shard_map.shards
        self.mailboxes: Mailboxes | None = None

    def open_mailboxes(self, local_shards: set[int], control: int) -> None:
        """
        Open mailboxes to the servers that share memory with this worker.

        Args:
            local_shards: the shards of these servers.
            control: number of values in a control record.
        """
        self._control = control
        self.mailboxes = Mailboxes(
            self.transport, local_shards, self.names, control, self._listen, self.check
        )

    def close(self) -> None:
        """Close the mailboxes."""
        if self.mailboxes is not None:
            self.mailboxes.close()

    def ask(self, what: str, call: ShardCall, cuts: Sequence[Shard] | None = None) -> list[Any]:
        """
        Call the servers of some shards, by default all; return the answers in the shards' order.

        Raises:
            ActorLost, DeadlineExceeded: a server is dead, or frozen.
            DistplatError: raised by a server.
        """
        shards = [cut.index for cut in (self.cuts if cuts is None else cuts)]
        by_index = lambda server, index: call(server, self.cuts[index])  # noqa: E731
        return self.start(what, by_index, shards).answers()

    def _listen(self, shard: int, mailboxes: MemoryAddress, slot: int) -> Any:
        order, server = self._order, self.servers[shard]
        identity = order.run, order.attempt, order.rank
        return self.transport.call(server, "listen", *identity, mailboxes, slot, self._control)


class FanOutCall:
    """
    One request to the servers of all shards, sent to each when its gradient is ready.

        send([2])      send([1])    send([0]), answers()
            ├── shard 2 updates ── its values travel ──▶ received at once
                           ├── shard 1 updates ── its values travel ──▶ received at once

    Args:
        fan_out: to the servers.
        what: name of the request, for messages.
        call: sends the request as an actor call.
        receive: called with each answer when it arrives.
        request: the same request for servers with a mailbox; None: actor calls only.
        setting: the field of `failure` that changes the deadline, which counts from `answers`.
    """

    def __init__(
        self,
        fan_out: FanOut,
        what: str,
        call: ShardCall,
        receive: ReceiveAnswer,
        request: MailboxRequest | None = None,
        setting: str = "step_timeout_s",
    ) -> None:
        self._fan_out, self._what, self._call, self._receive = fan_out, what, call, receive
        self._request, self._setting = request, setting
        self._mailboxes = fan_out.mailboxes if request is not None else None
        limit_s = fan_out.limit_s(setting)
        self._calls = PendingCall(
            fan_out.transport, what, {}, limit_s, setting, fan_out.check, self._prefetch
        )
        self._called: list[Shard] = []  #: shards whose servers were sent an actor call
        self._notified: list[
            int
        ] = []  #: indices of shards whose servers were sent a mailbox request

    def send(self, cuts: Sequence[Shard]) -> None:
        """Send the request to the servers of some shards; once for each shard."""
        for cut in cuts:
            if self._mailboxes is not None and cut.index in self._mailboxes.shards:
                assert self._request is not None, "mailboxes are used only with a request"
                self._notified.append(cut.index)
                self._mailboxes.notify(cut.index, self._request)
            else:
                self._called.append(cut)
                call = partial(self._call, self._fan_out.servers[cut.index], cut)
                self._calls.add(self._fan_out.names[cut.index], call)

    def answers(self) -> list[ServerReply]:
        """
        Wait for all answers, pass each to `receive` when it arrives, and return them by shard.

        Raises:
            ActorLost, DeadlineExceeded: a server is dead, or frozen.
            DistplatError: raised by a server.
        """
        self._calls.restart_deadline()
        replies: dict[int, ServerReply] = {}
        if self._mailboxes is not None:
            limit_s = self._fan_out.limit_s(self._setting)
            arrived = self._mailboxes.answers(self._notified, self._what, limit_s, self._setting)
            for index, answer in arrived:
                self._receive(self._fan_out.cuts[index], answer)
                replies[index] = answer
        for number, answer in self._calls.arrivals():
            cut = self._called[number]
            self._receive(cut, answer)
            replies[cut.index] = answer
        return [replies[cut.index] for cut in self._fan_out.cuts]

    def _prefetch(self, number: int, reply: Any) -> None:
        """Prefetch an answer's values to this node as soon as the answer arrives."""
        self._fan_out.transport.prefetch(reply, lambda answer: answer.payload and answer.payload[0])
