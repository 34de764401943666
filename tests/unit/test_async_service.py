"""A served shard: who waits, what a repeated call gets, who is named when a wait runs out."""

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
"""Deadlines: one that is meant to pass, one that is not."""

RECORD = full_record()


class Served:
    """A service, and one vector per worker into which it delivers."""

    def __init__(self, world: int, limit_s: float = LONG) -> None:
        plan = async_plan(world, STEPS, Consistency(asynchronous=True))
        self.world = world
        limits = ServerLimits(limit_s, limit_s)
        self.service = ShardServer("server-0", plan, limits, torch.zeros(SIZE))
        self.vectors = [torch.full((SIZE,), -1.0) for _ in range(world)]
        self.deliveries = 0

    def open(self) -> "Served":
        self.service.restore(0, lambda params: params.fill_(1.0))
        return self

    def deliver(self, rank: int) -> Callable[[Tensor, int], Any]:
        def deliver(values: Tensor, version: int) -> str:
            self.deliveries += 1
            self.vectors[rank].copy_(values)
            return f"version {version}"

        return deliver

    def push(self, rank: int, seq: int) -> ServerReply:
        push = PushId("run", 1, rank, seq, seq * self.world + rank)
        return self.service.push(push, noise(SIZE, rank, seq), RECORD, self.deliver(rank))

    def pull(self, rank: int, number: int) -> ServerReply:
        return self.service.pull(PullId(1, rank, number), self.deliver(rank))


def test_a_push_brings_the_newest_values() -> None:
    served = Served(2).open()
    assert served.pull(0, 0).version == 0
    assert torch.equal(served.vectors[0], torch.ones(SIZE))
    served.push(1, 0)
    answer = served.push(0, 0)
    assert (answer.version, answer.staleness, answer.committed) == (2, 1, True)
    assert torch.equal(served.vectors[0], served.service.params)
    assert not torch.equal(served.vectors[1], served.service.params)


def test_a_repeated_push_gets_the_same_answer_and_touches_nothing() -> None:
    served = Served(2).open()
    first = served.push(0, 0)
    served.push(1, 0)
    before = served.vectors[0].clone()  # the worker computes on it
    assert served.push(0, 0) is first
    assert torch.equal(served.vectors[0], before)
    assert served.service.store.version == 2


def test_a_repeated_pull_gets_the_same_answer_and_touches_nothing() -> None:
    served = Served(2).open()
    first = served.pull(0, 0)
    served.push(1, 0)
    assert served.pull(0, 0) is first
    assert torch.equal(served.vectors[0], torch.ones(SIZE))
    assert served.pull(0, 1).version == 1
    with pytest.raises(StaleError):
        served.pull(0, 0)
    before = served.push(0, 0)
    with pytest.raises(StaleError):
        served.pull(0, 1)  # it came late: the worker is past it
    assert served.push(0, 0) is before


def test_no_payload_of_an_old_pull_is_kept() -> None:
    """Between nodes it would hold a copy of the model in Ray's store for the whole run."""
    served = Served(1).open()
    served.pull(0, 0)
    served.push(0, 0)
    assert served.service._pulls[0][1] is None


def test_parameters_are_restored_once() -> None:
    """A call that is made twice must not take the run back to its beginning."""
    served = Served(1).open()
    served.push(0, 0)
    before = served.service.params.clone()
    served.open()
    assert torch.equal(served.service.params, before)
    assert served.service.store.version == 1


def test_nobody_waits() -> None:
    served = Served(2, limit_s=LONG).open()
    answers = [served.push(1, seq) for seq in range(STEPS)]
    assert [answer.version for answer in answers] == [1, 2, 3, 4]
    assert all(answer.waiting_s < LONG for answer in answers)


def test_a_push_asked_again_while_it_is_under_way_is_applied_once() -> None:
    served = Served(2).open()
    answers = on_ranks(3, lambda place: served.push(1, 0))
    assert answers[0] is answers[1] is answers[2]
    assert (served.service.store.version, served.deliveries) == (1, 1)


def test_of_a_task_that_was_made_before_the_worker_is_told() -> None:
    served = Served(2).open()
    served.push(1, 0)
    late = served.service.push(PushId("run", 1, 0, 0, 1), noise(SIZE, 9), RECORD, served.deliver(0))
    assert (late.version, late.dropped, late.done) == (1, 1, 0)
    assert torch.equal(served.vectors[0], served.service.params)


def test_nobody_restores() -> None:
    with pytest.raises(DeadlineExceeded, match=r"missing: worker-0; .*start_timeout_s"):
        Served(2, limit_s=SOON).pull(1, 0)


def test_there_is_nothing_to_commit() -> None:
    served = Served(1).open()
    with pytest.raises(ProtocolError, match="by itself"):
        served.service.commit(0, 0, 1.0, served.deliver(0))


def test_who_comes_to_its_answer_after_the_commit_still_gets_the_norm() -> None:
    """Two shards and `clip_norm`: what it does with the other shard depends on it."""
    plan = async_plan(1, 2, SYNCHRONOUS, shards=2, strategy="ps-sync", clip_norm=1.0)
    service = ShardServer("server-0", plan, ServerLimits(LONG, LONG), torch.zeros(SIZE))
    service.restore(0, lambda params: None)
    push = PushId("run", 1, 0, 0)

    def deliver(values: Tensor, version: int) -> None:
        pass

    first = service.push(push, noise(SIZE, 1), RECORD, deliver)
    assert not first.committed and first.squared_norm
    service.commit(0, 0, 2.0, deliver)
    late = service.push(push, noise(SIZE, 1), RECORD, deliver)
    assert (late.committed, late.squared_norm) == (False, first.squared_norm)


def test_the_first_step_has_the_deadline_of_the_start() -> None:
    plan = async_plan(2, 2, SYNCHRONOUS, strategy="ps-sync")
    service = ShardServer("server-0", plan, ServerLimits(SOON, SOON / 2), torch.zeros(SIZE))
    service.restore(3, lambda params: None)  # where the attempt begins
    for seq, setting, limit_s in ((3, "start_timeout_s", SOON), (4, "step_timeout_s", SOON / 2)):
        push = PushId("run", 1, 0, seq)
        with pytest.raises(DeadlineExceeded) as caught:
            service.push(push, noise(SIZE, 1), RECORD, lambda values, version: None)
        assert (caught.value.setting, caught.value.seconds) == (f"failure.{setting}", limit_s)
        service.push(PushId("run", 1, 1, seq), noise(SIZE, 1), RECORD, lambda values, version: None)


def test_the_consistency_chooses_the_ledger() -> None:
    for consistency, kind in ((SYNCHRONOUS, StepLedger), (Consistency(True), TaskLedger)):
        plan = async_plan(1, 1, consistency)
        assert type(ShardServer("s", plan, ServerLimits(1, 1), torch.zeros(3)).store.ledger) is kind
