"""One worker's pushes, commits and pulls, over the lines and the road that it has at present."""

from functools import partial

from distplat.actors.memory.device_copy import DirectTransfer
from distplat.actors.memory.mailboxes import MailboxRequest
from distplat.actors.messages import WorkOrder
from distplat.actors.servers.fan_out import FanOut, FanOutCall
from distplat.actors.servers.vector_transport import VectorTransport, part
from distplat.actors.transport import TransportError
from distplat.platform.errors import ActorLost
from distplat.platform.ledger import Answer, PullId, PushId
from distplat.platform.shard_map import Shard
from distplat.strategies.loop.control import StepControl
from distplat.strategies.ports import Pushed
from distplat.strategies.server.answers import pushed


class Pushes:
    """
    Asks all servers for values, and has them taken as they come.

    Args:
        order: the worker's orders.
        lines: to the servers.
        road: where the worker's vectors lie.
        transfer: to the device.
        versions: by shard, that of the values which are here; kept up to date.
    """

    def __init__(
        self,
        order: WorkOrder,
        lines: FanOut,
        road: VectorTransport,
        transfer: DirectTransfer,
        versions: dict[int, int],
    ) -> None:
        self._order, self._lines, self._road, self._transfer = order, lines, road, transfer
        self._versions = versions
        self._limit_s = order.job.failure.step_timeout_s

    def push(self, step: int, control: StepControl, task: int | None, setting: str) -> Pushed:
        """See `Shards`; `setting` is the field of `failure` that changes the deadline."""
        record = control.pack()
        if self._lines.mailboxes is not None:
            self._lines.mailboxes.control[:] = record
        road, order, call = self._road, self._order, self._lines.transport.call
        push = PushId(order.run, order.attempt, order.rank, step, task)
        asked = FanOutCall(
            self._lines,
            f"push {step}",
            lambda server, cut: call(
                server, "push", push, road.payload(cut, road.gradients), record
            ),
            self._take,
            MailboxRequest(step, task=task),
            setting,
        )
        for cut in self._lines.cuts:
            send = partial(asked.send, [cut])
            self._transfer.to_host(part(road.gradients, cut), cut.start, send)
        self._transfer.wait(self._limit_s)
        return self._made(asked)

    def commit(self, step: int, norm: float) -> Pushed:
        """See `Shards`."""
        rank, call = self._order.rank, self._lines.transport.call
        question = lambda server, cut: call(server, "commit", rank, step, norm)  # noqa: E731
        request = MailboxRequest(step, norm)
        asked = FanOutCall(self._lines, f"commit {step}", question, self._take, request)
        asked.send(self._lines.cuts)
        return self._made(asked)

    def pull(self, pull: PullId, setting: str) -> list[Answer]:
        """Bring the newest parameters."""
        call = self._lines.transport.call
        question = lambda server, cut: call(server, "pull", pull)  # noqa: E731
        what = f"pull {pull.number}"
        asked = FanOutCall(self._lines, what, question, self._take, setting=setting)
        asked.send(self._lines.cuts)
        return self._answers(asked)

    def _made(self, asked: FanOutCall) -> Pushed:
        answers = self._answers(asked)
        return pushed(answers, [self._road.traffic(cut) for cut in self._lines.cuts])

    def _answers(self, asked: FanOutCall) -> list[Answer]:
        answers = asked.answers()
        self._transfer.join()
        return answers

    def _take(self, cut: Shard, answer: Answer) -> None:
        """Bring a shard's values here, as far as they are not here already."""
        if not answer.committed:
            return
        self._versions[cut.index] = answer.version
        try:
            self._road.take(cut, answer, self._limit_s)
        except TransportError as error:  # with its owner an object is lost, too
            cause = f"its answer could not be fetched: {error}"
            raise ActorLost(self._lines.names[cut.index], None, cause) from None
        self._transfer.to_device(part(self._road.parameters, cut), cut.start)
