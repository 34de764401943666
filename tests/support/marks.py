"""Marks for single cases of a test."""

from collections import Counter
from collections.abc import Iterable
from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)
"""A case that `make test` skips: it repeats what a faster case shows."""


def mark_sweeps(items: Iterable[pytest.Item]) -> None:
    """
    Of each test marked `sweep(n)`, leave every n-th case to `make test`, and mark the rest slow.

    The n-th is counted on by one with each n cases, so that where a test has a grid of cases,
    `make test` has some of every row and of every column.
    """
    seen: Counter[str] = Counter()
    for item in items:
        sweep = item.get_closest_marker("sweep")
        if sweep is None or item.get_closest_marker("slow"):
            continue
        (every,) = sweep.args
        test = item.nodeid.partition("[")[0]
        number = seen[test]
        seen[test] += 1
        if (number + number // every) % every:
            item.add_marker("slow")
