"""Selection of the cases of a sweep for `make test`."""

from __future__ import annotations

from typing import Any

import marks
import pytest


class FakeItem:
    """The part of `pytest.Item` that `mark_sweeps` uses."""

    def __init__(self, name: str, *decorators: Any) -> None:
        self.nodeid = name
        self.marks = {decorator.name: decorator.mark for decorator in decorators}

    def get_closest_marker(self, name: str) -> Any:
        return self.marks.get(name)

    def add_marker(self, name: str) -> None:
        self.marks[name] = getattr(pytest.mark, name)


def selected(cases: list[Any]) -> list[str]:
    marks.mark_sweeps(cases)
    return [case.nodeid for case in cases if "slow" not in case.marks]


def test_sweep_selects_a_case_of_each_row_and_column() -> None:
    cases = [
        FakeItem(f"t[{row}-{column}]", pytest.mark.sweep(3)) for row in range(3) for column in "abc"
    ]
    assert selected(cases) == ["t[0-a]", "t[1-c]", "t[2-b]"]


def test_sweep_selects_at_least_one_case_of_each_test() -> None:
    cases = [FakeItem(name, pytest.mark.sweep(4)) for name in ("t[0]", "u[0]", "u[1]", "v")]
    assert selected(cases) == ["t[0]", "u[0]", "v"]


def test_slow_and_unmarked_tests_are_unchanged() -> None:
    cases = [
        FakeItem("t[0]", pytest.mark.sweep(2), pytest.mark.slow),
        FakeItem("t[1]", pytest.mark.sweep(2)),
    ]
    assert selected([*cases, FakeItem("u[0]"), FakeItem("u[1]")]) == ["t[1]", "u[0]", "u[1]"]
