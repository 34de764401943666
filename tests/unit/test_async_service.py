"""`ShardServer`: repeated calls, deadlines, and which rank an expired deadline names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from control_records import full_record
from delayed import async_plan, noise
from rank_threads import on_ranks
from torch import Tensor

from distplat.platform.errors import DeadlineExceeded, ProtocolError, StaleError
from distplat.platform.ledger import PullId, PushId, ServerReply, StepLedger, TaskLedger
from distplat.platform.spec import SYNCHRONOUS, Consistency
from distplat.strategies.server.server import ServerLimits, ShardServer

SIZE, STEPS = 9, 4
SOON, LONG = 0.2, 10.0
"""Deadlines: one that expires in the test, and one that does not."""

RECORD = full_record()


class ServerRig:
    """A server, and one vector per worker for its deliveries."""

    def __init__(self, world: int, limit_s: float = LONG) -> None:
        plan = async_plan(world, STEPS, Consistency(asynchronous=True))
        self.world = world
        limits = ServerLimits(limit_s, limit_s)
        self.server = ShardServer("server-0", plan, limits, torch.zeros(SIZE))
        self.vectors = [torch.full((SIZE,), -1.0) for _ in range(world)]
        self.deliveries = 0

    def open(self) -> "ServerRig":
        self.server.restore(0, lambda params: params.fill_(1.0))
        return self

    def deliver(self, rank: int) -> Callable[[Tensor, int], Any]:
        def deliver(values: Tensor, version: int) -> str:
            self.deliveries += 1
            self.vectors[rank].copy_(values)
            return f"version {version}"

        return deliver

    def push(self, rank: int, seq: int) -> ServerReply:
        push = PushId("run", 1, rank, seq, seq * self.world + rank)
        return self.server.push(push, noise(SIZE, rank, seq), RECORD, self.deliver(rank))

    def pull(self, rank: int, number: int) -> ServerReply:
        return self.server.pull(PullId(1, rank, number), self.deliver(rank))


def test_push_returns_newest_values() -> None:
    rig = ServerRig(2).open()
    assert rig.pull(0, 0).version == 0
    assert torch.equal(rig.vectors[0], torch.ones(SIZE))
    rig.push(1, 0)
    reply = rig.push(0, 0)
    assert (reply.version, reply.staleness, reply.committed) == (2, 1, True)
    assert torch.equal(rig.vectors[0], rig.server.params)
    assert not torch.equal(rig.vectors[1], rig.server.params)


def test_repeated_push_gets_same_reply_without_effect() -> None:
    rig = ServerRig(2).open()
    first = rig.push(0, 0)
    rig.push(1, 0)
    before = rig.vectors[0].clone()  # the worker reads this vector
    assert rig.push(0, 0) is first
    assert torch.equal(rig.vectors[0], before)
    assert rig.server.store.version == 2


def test_repeated_pull_gets_same_reply_without_effect() -> None:
    rig = ServerRig(2).open()
    first = rig.pull(0, 0)
    rig.push(1, 0)
    assert rig.pull(0, 0) is first
    assert torch.equal(rig.vectors[0], torch.ones(SIZE))
    assert rig.pull(0, 1).version == 1
    with pytest.raises(StaleError):
        rig.pull(0, 0)
    before = rig.push(0, 0)
    with pytest.raises(StaleError):
        rig.pull(0, 1)  # a delayed call: the worker has already pushed
    assert rig.push(0, 0) is before


def test_push_releases_payload_of_earlier_pull() -> None:
    """A kept payload would hold a copy of the model in Ray's object store for the whole run."""
    rig = ServerRig(1).open()
    rig.pull(0, 0)
    rig.push(0, 0)
    assert rig.server._pulls[0][1] is None


def test_repeated_restore_has_no_effect() -> None:
    """A duplicated call must not reset the parameters."""
    rig = ServerRig(1).open()
    rig.push(0, 0)
    before = rig.server.params.clone()
    rig.open()
    assert torch.equal(rig.server.params, before)
    assert rig.server.store.version == 1


def test_asynchronous_pushes_do_not_wait() -> None:
    rig = ServerRig(2, limit_s=LONG).open()
    replies = [rig.push(1, seq) for seq in range(STEPS)]
    assert [reply.version for reply in replies] == [1, 2, 3, 4]
    assert all(reply.waiting_s < LONG for reply in replies)


def test_concurrent_repeats_of_a_push_are_applied_once() -> None:
    rig = ServerRig(2).open()
    replies = on_ranks(3, lambda place: rig.push(1, 0))
    assert replies[0] is replies[1] is replies[2]
    assert (rig.server.store.version, rig.deliveries) == (1, 1)


def test_push_of_a_completed_task_is_dropped_and_reported() -> None:
    rig = ServerRig(2).open()
    rig.push(1, 0)
    reply = rig.server.push(PushId("run", 1, 0, 0, 1), noise(SIZE, 9), RECORD, rig.deliver(0))
    assert (reply.version, reply.dropped, reply.done) == (1, 1, 0)
    assert torch.equal(rig.vectors[0], rig.server.params)


def test_deadline_without_restore_names_rank_0() -> None:
    with pytest.raises(DeadlineExceeded, match=r"missing: worker-0; .*start_timeout_s"):
        ServerRig(2, limit_s=SOON).pull(1, 0)


def test_asynchronous_server_rejects_commit() -> None:
    rig = ServerRig(1).open()
    with pytest.raises(ProtocolError, match="by itself"):
        rig.server.commit(0, 0, 1.0, rig.deliver(0))


def test_push_repeated_after_commit_returns_the_norm() -> None:
    """With two shards and `clip_norm` the worker needs the norm to commit the other shard."""
    plan = async_plan(1, 2, SYNCHRONOUS, shards=2, strategy="ps-sync", clip_norm=1.0)
    server = ShardServer("server-0", plan, ServerLimits(LONG, LONG), torch.zeros(SIZE))
    server.restore(0, lambda params: None)
    push = PushId("run", 1, 0, 0)

    def deliver(values: Tensor, version: int) -> None:
        pass

    first = server.push(push, noise(SIZE, 1), RECORD, deliver)
    assert not first.committed and first.squared_norm
    server.commit(0, 0, 2.0, deliver)
    reply = server.push(push, noise(SIZE, 1), RECORD, deliver)
    assert (reply.committed, reply.squared_norm) == (False, first.squared_norm)


def test_first_step_has_the_start_deadline() -> None:
    plan = async_plan(2, 2, SYNCHRONOUS, strategy="ps-sync")
    server = ShardServer("server-0", plan, ServerLimits(SOON, SOON / 2), torch.zeros(SIZE))
    server.restore(3, lambda params: None)  # the attempt's first step
    for seq, setting, limit_s in ((3, "start_timeout_s", SOON), (4, "step_timeout_s", SOON / 2)):
        push = PushId("run", 1, 0, seq)
        with pytest.raises(DeadlineExceeded) as caught:
            server.push(push, noise(SIZE, 1), RECORD, lambda values, version: None)
        assert (caught.value.setting, caught.value.seconds) == (f"failure.{setting}", limit_s)
        server.push(PushId("run", 1, 1, seq), noise(SIZE, 1), RECORD, lambda values, version: None)


def test_consistency_selects_the_ledger() -> None:
    for consistency, ledger_type in ((SYNCHRONOUS, StepLedger), (Consistency(True), TaskLedger)):
        plan = async_plan(1, 1, consistency)
        assert (
            type(ShardServer("s", plan, ServerLimits(1, 1), torch.zeros(3)).store.ledger)
            is ledger_type
        )
