"""The log of applied updates: its file, its statistics, and the detection of flaws."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from leads import largest_lead
from safetensors.numpy import save

from distplat.platform.apply_log import (
    Applied,
    ApplyLog,
    log_flaws,
    pack_log,
    read_logs,
    staleness_counts,
)
from distplat.platform.errors import StorageError

GOOD = [(1, 0, 0), (0, 1, 0), (1, 2, 1), (1, 4, 3), (0, 3, 2), (5, 5, 0)]
"""Three steps of two tasks; rank 5 joins later and computes one task."""


def log_of(rows: list[tuple[int, int, int]]) -> ApplyLog:
    log = ApplyLog()
    for row in rows:
        log.add(Applied(*row))
    return log


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    path.write_bytes(pack_log([log_of(GOOD).numbers(), log_of([]).numbers()], {"run": "r"}))
    logs, facts = read_logs(str(path))
    assert [list(log) for log in logs] == [[Applied(*row) for row in GOOD], []]
    assert facts["run"] == "r"


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", b"\0" * 100])
def test_damaged_file_raises_storage_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=r"log\.safetensors"):
        read_logs(str(path))


def test_rejects_file_without_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    path.write_bytes(pack_log([np.zeros((4, 2), dtype=np.int64)], {}))
    with pytest.raises(StorageError, match="no log of updates"):
        read_logs(str(path))


def test_rejects_log_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    path.write_bytes(save({"shard-0": log_of(GOOD).numbers()}, {"columns": "rank,seq,pulled"}))
    with pytest.raises(StorageError, match="another version of distplat"):
        read_logs(str(path))


def test_counts_staleness_by_rank() -> None:
    counts = staleness_counts([log_of(GOOD[:-1])], 3)
    assert counts == [Counter({1: 1, 2: 1}), Counter({0: 2, 1: 1}), Counter()]
    assert staleness_counts([log_of(GOOD)], 2)[5] == Counter({5: 1})


def test_lead_is_measured_when_a_gradient_is_applied() -> None:
    assert largest_lead(log_of(GOOD), 2) == 1
    assert largest_lead(log_of([(1, task, task) for task in (1, 3, 5, 7, 9)]), 2) == 4
    assert largest_lead(log_of([]), 2) == 0


def test_no_flaws_in_a_valid_log() -> None:
    assert log_flaws(log_of(GOOD), 2, 3) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[:-1], "1 tasks are missing, the first is 5"),
        ([*GOOD, (1, 6, 6)], "update 6 is task 6 of rank 1: the run has 6"),
        ([*GOOD[:3], GOOD[2], *GOOD[3:]], "update 3 is task 2, which was applied before"),
        ([*GOOD[:2], *GOOD[3:]], "update 2 was computed at version 3"),
        ([(-1, 0, 0)], "update 0 is task 0 of rank -1"),
        ([(0, 0, 1)], "computed at version 1"),
        ([(0, 0, 0), (0, 1, 0)], "computed at version 0"),
    ],
)
def test_finds_flaws(rows: list[tuple[int, int, int]], message: str) -> None:
    flaws = log_flaws(log_of(rows), 2, 3)
    assert message in flaws[0]
