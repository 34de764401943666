"""The fakes in memory pass the contract tests of the real ports, including failures."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from collective_contract import CHECKS, FAILURES, Check, part_of
from rank_threads import on_ranks

from distplat.platform.errors import CollectiveError
from distplat.strategies.fakes import Fabric

TIMEOUT_S = 0.2
"""Deadline of operations that should time out, seconds."""
LIMIT_S = 60.0


@pytest.mark.sweep(3)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_collective_contract(check: Check, world: int) -> None:
    fabric = Fabric(world)
    on_ranks(world, lambda rank: check(fabric.collective(rank)))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", FAILURES.values(), ids=FAILURES)
def test_collective_contract_of_failures(check: Check, world: int) -> None:
    fabric = Fabric(world, timeout_s=TIMEOUT_S)
    on_ranks(world, lambda rank: check(fabric.collective(rank)))


def test_all_checks_in_sequence_on_one_group() -> None:
    fabric = Fabric(3)

    def body(rank: int) -> None:
        group = fabric.collective(rank)
        for check in CHECKS.values():
            check(group)

    on_ranks(3, body)


def test_world_of_one_does_not_wait() -> None:
    group = Fabric(1, timeout_s=TIMEOUT_S).collective(0)
    tensor = part_of(0)
    group.all_reduce(tensor)
    group.broadcast(tensor)
    group.barrier()
    assert torch.equal(tensor, part_of(0))


def test_barrier_waits_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric, is_over = Fabric(2, timeout_s=LIMIT_S), Fabric._is_over
    waiting_or_passed = threading.Event()
    passed: list[int] = []

    def signal_if_waiting(fabric: Fabric, *args: Any) -> bool:
        over = is_over(fabric, *args)
        if not over:
            waiting_or_passed.set()
        return over

    def body(rank: int) -> None:
        if rank == 1:
            assert waiting_or_passed.wait(LIMIT_S)
            assert not passed
        fabric.collective(rank).barrier()
        passed.append(rank)
        waiting_or_passed.set()

    monkeypatch.setattr(Fabric, "_is_over", signal_if_waiting)
    on_ranks(2, body)


def test_all_reduce_sums_in_rank_order() -> None:
    """In float32 1e8 + 1 equals 1e8, so only the order of ranks 0, 1, 2 gives 1."""
    parts = [1e8, -1e8, 1.0]
    fabric = Fabric(3)

    def body(rank: int) -> float:
        tensor = torch.tensor([parts[rank]])
        fabric.collective(rank).all_reduce(tensor)
        return float(tensor)

    assert on_ranks(3, body) == [1.0, 1.0, 1.0]


def test_completed_operations_are_released() -> None:
    fabric = Fabric(2)

    def body(rank: int) -> None:
        group = fabric.collective(rank)
        for _ in range(5):
            group.all_reduce(part_of(rank))

    on_ranks(2, body)
    assert not fabric._rounds


def errors_of(world: int, body: Callable[[int], None]) -> list[Exception | None]:
    """Return the exception that each rank raised, or None."""

    def catch(rank: int) -> Exception | None:
        try:
            body(rank)
        except Exception as error:
            return error
        return None

    return on_ranks(world, catch)


def test_errors_name_a_killed_rank() -> None:
    fabric = Fabric(3, timeout_s=1.0)  # the other two ranks meet within it
    fabric.kill(1, after=2)
    completed = [0, 0, 0]

    def body(rank: int) -> None:
        group = fabric.collective(rank)
        for _ in range(4):
            group.all_reduce(part_of(rank))
            completed[rank] += 1

    errors = errors_of(3, body)
    assert completed == [2, 2, 2]
    for error in errors:
        assert isinstance(error, CollectiveError)
        assert (error.operation, error.number, error.missing) == ("all_reduce", 2, (1,))
    assert "killed" in str(errors[1])


def test_recv_timeout_names_the_sender() -> None:
    group = Fabric(3, timeout_s=TIMEOUT_S).collective(0)
    with pytest.raises(CollectiveError) as caught:
        group.recv(torch.zeros(3), 2)
    assert (caught.value.operation, caught.value.missing) == ("recv", (2,))
