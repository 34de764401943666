"""The contract of `Collective`, held against shared memory with ranks as threads."""

import pytest
from collective_contract import CHECKS, FAILURES, Check
from shm_ranks import on_shm_ranks

SOON = 0.3
"""Deadline where one is meant to pass, seconds."""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_contract(check: Check, world: int) -> None:
    on_shm_ranks(world, check)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", FAILURES.values(), ids=FAILURES)
def test_contract_of_failures(check: Check, world: int) -> None:
    on_shm_ranks(world, check, operation_s=SOON)


def test_all_checks_follow_each_other_on_one_group() -> None:
    def body(group: object) -> None:
        for check in CHECKS.values():
            check(group)  # type: ignore[arg-type]

    on_shm_ranks(6, body)
