"""Contract tests of `Collective` for shared memory, with ranks as threads."""

import pytest
from collective_contract import CHECKS, FAILURES, Check
from shm_ranks import on_shm_ranks

SHORT_S = 0.3
"""Deadline of operations that should time out, seconds."""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_contract(check: Check, world: int) -> None:
    on_shm_ranks(world, check)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", FAILURES.values(), ids=FAILURES)
def test_contract_of_failures(check: Check, world: int) -> None:
    on_shm_ranks(world, check, operation_s=SHORT_S)


def test_all_checks_on_one_group() -> None:
    def run_all_checks(group: object) -> None:
        for check in CHECKS.values():
            check(group)  # type: ignore[arg-type]

    on_shm_ranks(6, run_all_checks)
