"""FanOutCall: calls to all servers, whose answers are processed as they arrive."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from call_faults import Fault, inject

from distplat.actors.local_transport import LocalCluster
from distplat.actors.memory.mailboxes import MailboxRequest
from distplat.actors.servers.fan_out import FanOut, FanOutCall
from distplat.platform.ledger import ServerReply
from distplat.platform.shard_map import Shard, cut_shards

CUTS = cut_shards(48, 3).shards


class Server:
    """Replies with its number as the version."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def push(self) -> ServerReply:
        self.calls += 1
        return ServerReply(self.number)


class Cluster:
    """Three servers, some with mailboxes."""

    def __init__(self, local_shards: set[int]) -> None:
        self.cluster = LocalCluster()
        self.transport = self.cluster.transport("here", "worker-0")
        self.servers = [
            self.cluster.spawn(f"server-{n}", "there", lambda _, n=n: Server(n))  # type: ignore[misc]
            for n in range(3)
        ]
        self.notified: list[int] = []
        self.shards = sorted(local_shards)
        self.fan_out = SimpleNamespace(
            transport=self.transport,
            cuts=CUTS,
            servers=self.servers,
            names=["server-0", "server-1", "server-2"],
            mailboxes=self if local_shards else None,
            check=None,
            limit_s=lambda setting: 5.0,
        )

    def delay(self, shard: int, seconds: float) -> None:
        inject(self.cluster, "push", Fault(delay_s=seconds), actor=f"server-{shard}")

    def called(self) -> list[int]:
        return [number for number, server in enumerate(self.servers) if server.body.calls]

    def notify(self, shard: int, request: MailboxRequest) -> None:
        self.notified.append(shard)

    def answers(self, notified: list[int], *_: Any) -> Any:
        yield from ((shard, ServerReply(shard)) for shard in notified)

    def fan_out_call(
        self, take: Callable[[Shard, ServerReply], None], *, mailboxes: bool = True
    ) -> FanOutCall:
        request = MailboxRequest(0) if mailboxes else None
        ask = lambda server, cut: self.transport.call(server, "push")  # noqa: E731
        return FanOutCall(cast(FanOut, self.fan_out), "push 0", ask, take, request)


def test_answers_are_processed_as_they_arrive() -> None:
    cluster, taken = Cluster(set()), list[int]()
    cluster.delay(0, 0.2)
    cluster.delay(1, 0.4)
    call = cluster.fan_out_call(lambda cut, answer: taken.append(cut.index))
    call.send(CUTS)
    assert [answer.version for answer in call.answers()] == [0, 1, 2]
    assert taken == [2, 0, 1]


def test_local_servers_are_notified_and_remote_ones_called() -> None:
    cluster, taken = Cluster({1}), list[int]()
    cluster.delay(0, 0.2)
    call = cluster.fan_out_call(lambda cut, answer: taken.append(cut.index))
    call.send(CUTS[1:])
    call.send(CUTS[:1])
    assert [answer.version for answer in call.answers()] == [0, 1, 2]
    assert taken == [1, 2, 0]
    assert cluster.notified == [1] and cluster.called() == [0, 2]


def test_pull_calls_all_servers() -> None:
    cluster = Cluster({0, 1, 2})
    call = cluster.fan_out_call(lambda cut, answer: None, mailboxes=False)
    call.send(CUTS)
    call.answers()
    assert cluster.notified == [] and cluster.called() == [0, 1, 2]
