"""The log of updates: written, read, and what it tells."""

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
"""Three steps of two parts; rank 5 has joined, and makes one task."""


def log(rows: list[tuple[int, int, int]]) -> ApplyLog:
    made = ApplyLog()
    for row in rows:
        made.add(Applied(*row))
    return made


def test_it_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    path.write_bytes(pack_log([log(GOOD).numbers(), log([]).numbers()], {"run": "r"}))
    logs, facts = read_logs(str(path))
    assert [list(one) for one in logs] == [[Applied(*row) for row in GOOD], []]
    assert facts["run"] == "r"


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", b"\0" * 100])
def test_a_damaged_file_is_an_error_of_ours(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=r"log\.safetensors"):
        read_logs(str(path))


def test_a_file_of_other_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    path.write_bytes(pack_log([np.zeros((4, 2), dtype=np.int64)], {}))
    with pytest.raises(StorageError, match="no log of updates"):
        read_logs(str(path))


def test_a_log_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    path.write_bytes(save({"shard-0": log(GOOD).numbers()}, {"columns": "rank,seq,pulled"}))
    with pytest.raises(StorageError, match="another version of distplat"):
        read_logs(str(path))


def test_staleness_is_counted_by_rank() -> None:
    found = staleness_counts([log(GOOD[:-1])], 3)
    assert found == [Counter({1: 1, 2: 1}), Counter({0: 2, 1: 1}), Counter()]
    assert staleness_counts([log(GOOD)], 2)[5] == Counter({5: 1})


def test_the_lead_is_counted_when_a_gradient_comes() -> None:
    assert largest_lead(log(GOOD), 2) == 1
    assert largest_lead(log([(1, task, task) for task in (1, 3, 5, 7, 9)]), 2) == 4
    assert largest_lead(log([]), 2) == 0


def test_a_good_log_has_no_flaw() -> None:
    assert log_flaws(log(GOOD), 2, 3) == []


@pytest.mark.parametrize(
    ("rows", "said"),
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
def test_flaws_are_found(rows: list[tuple[int, int, int]], said: str) -> None:
    found = log_flaws(log(rows), 2, 3)
    assert said in found[0]
