"""Which cases of a sweep `make test` has."""

from __future__ import annotations

from typing import Any

import marks
import pytest


class Case:
    """As much of an item of pytest's as is looked at."""

    def __init__(self, name: str, *given: Any) -> None:
        self.nodeid = name
        self.marks = {one.name: one.mark for one in given}

    def get_closest_marker(self, name: str) -> Any:
        return self.marks.get(name)

    def add_marker(self, name: str) -> None:
        self.marks[name] = getattr(pytest.mark, name)


def kept(cases: list[Any]) -> list[str]:
    marks.mark_sweeps(cases)
    return [one.nodeid for one in cases if "slow" not in one.marks]


def test_a_grid_keeps_some_of_each_row_and_column() -> None:
    cases = [
        Case(f"t[{row}-{column}]", pytest.mark.sweep(3)) for row in range(3) for column in "abc"
    ]
    assert kept(cases) == ["t[0-a]", "t[1-c]", "t[2-b]"]


def test_each_test_is_counted_by_itself_and_keeps_one_at_least() -> None:
    once = [Case(name, pytest.mark.sweep(4)) for name in ("t[0]", "u[0]", "u[1]", "v")]
    assert kept(once) == ["t[0]", "u[0]", "v"]


def test_what_is_slow_or_no_sweep_stays_as_it_is() -> None:
    cases = [
        Case("t[0]", pytest.mark.sweep(2), pytest.mark.slow),
        Case("t[1]", pytest.mark.sweep(2)),
    ]
    assert kept([*cases, Case("u[0]"), Case("u[1]")]) == ["t[1]", "u[0]", "u[1]"]
