"""The ports in memory keep the contracts of the real ones, their faults included."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from collective_contract import CHECKS, FAILURES, Check, part_of
from control_records import full_record, record_of
from rank_threads import on_ranks
from torch import nn

from distplat.platform.errors import ActorLost, CollectiveError, DeadlineExceeded
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import Job
from distplat.strategies.fakes import Fabric, InMemoryShards, ServerGroup
from distplat.strategies.training.flat import FlatModel

SOON = 0.2
"""Deadline where one is meant to pass, seconds."""


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_collective_contract(check: Check, world: int) -> None:
    fabric = Fabric(world)
    on_ranks(world, lambda rank: check(fabric.collective(rank)))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", FAILURES.values(), ids=FAILURES)
def test_collective_contract_of_failures(check: Check, world: int) -> None:
    fabric = Fabric(world, timeout_s=SOON)
    on_ranks(world, lambda rank: check(fabric.collective(rank)))


def test_all_checks_follow_each_other_on_one_group() -> None:
    fabric = Fabric(3)

    def body(rank: int) -> None:
        group = fabric.collective(rank)
        for check in CHECKS.values():
            check(group)

    on_ranks(3, body)


def test_a_world_of_one_waits_for_nobody() -> None:
    group = Fabric(1, timeout_s=SOON).collective(0)
    tensor = part_of(0)
    group.all_reduce(tensor)
    group.broadcast(tensor)
    group.barrier()
    assert torch.equal(tensor, part_of(0))


def test_the_barrier_waits_for_the_last() -> None:
    fabric = Fabric(2)
    came: list[int] = []

    def body(rank: int) -> None:
        if rank == 1:
            time.sleep(SOON)
            came.append(rank)
        fabric.collective(rank).barrier()
        assert came == [1]

    on_ranks(2, body)


def test_sums_are_made_in_rank_order() -> None:
    """1e8 swallows a 1 that is added to it: only 0 + 1 + 2 gives 1."""
    parts = [1e8, -1e8, 1.0]
    fabric = Fabric(3)

    def body(rank: int) -> float:
        tensor = torch.tensor([parts[rank]])
        fabric.collective(rank).all_reduce(tensor)
        return float(tensor)

    assert on_ranks(3, body) == [1.0, 1.0, 1.0]


def test_nothing_is_kept_of_operations_that_are_over() -> None:
    fabric = Fabric(2)

    def body(rank: int) -> None:
        group = fabric.collective(rank)
        for _ in range(5):
            group.all_reduce(part_of(rank))

    on_ranks(2, body)
    assert not fabric._rounds


def errors_of(world: int, body: Callable[[int], None]) -> list[Exception | None]:
    """What each rank raised."""

    def catch(rank: int) -> Exception | None:
        try:
            body(rank)
        except Exception as error:
            return error
        return None

    return on_ranks(world, catch)


def test_a_killed_rank_is_named_by_the_others() -> None:
    fabric = Fabric(3, timeout_s=SOON)
    fabric.kill(1, after=2)
    done = [0, 0, 0]

    def body(rank: int) -> None:
        group = fabric.collective(rank)
        for _ in range(4):
            group.all_reduce(part_of(rank))
            done[rank] += 1

    errors = errors_of(3, body)
    assert done == [2, 2, 2]
    for error in errors:
        assert isinstance(error, CollectiveError)
        assert (error.operation, error.number, error.missing) == ("all_reduce", 2, (1,))
    assert "killed" in str(errors[1])


def test_a_message_that_does_not_come_names_its_sender() -> None:
    group = Fabric(3, timeout_s=SOON).collective(0)
    with pytest.raises(CollectiveError) as caught:
        group.recv(torch.zeros(3), 2)
    assert (caught.value.operation, caught.value.missing) == ("recv", (2,))


def plan(world: int, servers: int) -> ShardPlan:
    job = Job.model_validate(
        {
            "name": "fakes",
            "strategy": "ps-sync",
            "scaling": {"num_workers": world},
            "optimizer": {"name": "SGD", "lr": 0.5},
            "steps": 3,
            "global_batch_size": 4,
            "clip_norm": 1000.0,
        }
    )
    return ShardPlan(job, "run", 0, world, 3, servers)


def connected(
    group: ServerGroup, rank: int, value: float = 1.0
) -> tuple[InMemoryShards, FlatModel]:
    model = nn.Linear(10, 7, bias=False)
    nn.init.constant_(model.weight, value)
    flat, shards = FlatModel(model), InMemoryShards(group, rank)
    shards.connect(flat)
    return shards, flat


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_shards_sum_and_update(servers: int) -> None:
    group = ServerGroup(plan(2, servers))
    ends = [connected(group, rank) for rank in range(2)]

    def body(rank: int) -> float | None:
        shards, flat = ends[rank]
        for step in range(3):
            flat.grads.fill_(rank + 1.0)
            norm = shards.push(step, record_of(flat)).norm
            if norm is not None:
                shards.commit(step, norm)
        return norm

    norms = on_ranks(2, body)
    if servers > 1:  # a single one knows the norm by itself
        assert norms == [pytest.approx(3.0 * 70**0.5)] * 2
    else:
        assert norms == [None, None]
    for _, flat in ends:  # 3 steps of 0.5 * (1 + 2)
        assert torch.equal(flat.params, torch.full((70,), 1.0 - 3 * 1.5))


def test_all_ranks_start_from_the_first_ones_parameters() -> None:
    group = ServerGroup(plan(2, 2))
    connected(group, 0, value=1.0)
    _, flat = connected(group, 1, value=5.0)
    assert torch.equal(flat.params, torch.ones(70))


def test_a_missing_pusher_is_named() -> None:
    group = ServerGroup(plan(3, 2), timeout_s=SOON)
    ends = [connected(group, rank)[0] for rank in range(3)]

    def body(rank: int) -> None:
        if rank != 1:
            ends[rank].push(0, full_record())

    errors = errors_of(3, body)
    assert errors[1] is None
    for error in (errors[0], errors[2]):
        assert isinstance(error, DeadlineExceeded)
        assert (error.what, error.missing) == ("push 0 to server-0", ("worker-1",))
        assert error.setting == "failure.start_timeout_s", "the first step belongs to the start"


def test_a_late_pusher_is_waited_for() -> None:
    group = ServerGroup(plan(2, 1))
    ends = [connected(group, rank)[0] for rank in range(2)]
    pushed = threading.Event()

    def body(rank: int) -> None:
        if rank == 1:
            time.sleep(SOON)
            pushed.set()
        ends[rank].push(0, full_record())
        assert pushed.is_set()

    on_ranks(2, body)


@pytest.mark.parametrize("call", ["push", "commit"])
def test_a_lost_server_is_named(call: str) -> None:
    group = ServerGroup(plan(1, 2))
    shards, _ = connected(group, 0)
    shards.push(0, full_record())
    group.lost = "killed by the test"
    calls: dict[str, Callable[[], object]] = {
        "push": lambda: shards.push(1, full_record()),
        "commit": lambda: shards.commit(0, 1.0),
    }
    with pytest.raises(ActorLost, match=r"server-0 was lost.*killed by the test"):
        calls[call]()
