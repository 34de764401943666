"""Marks for single cases of a test."""

from collections import Counter
from collections.abc import Iterable
from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)
"""A case for `make test-all` only: a faster case covers the same behaviour."""


def mark_sweeps(items: Iterable[pytest.Item]) -> None:
    """
    Mark cases of tests with the mark `sweep(n)` as slow, except every n-th.

    The offset grows by one every n cases: of a grid of cases, `make test` runs some of each row and
    of each column.
    """
    counts: Counter[str] = Counter()
    for item in items:
        sweep = item.get_closest_marker("sweep")
        if sweep is None or item.get_closest_marker("slow"):
            continue
        (every,) = sweep.args
        test = item.nodeid.partition("[")[0]
        number = counts[test]
        counts[test] += 1
        if (number + number // every) % every:
            item.add_marker("slow")
