"""`split_evenly` returns complete, ordered parts, as even as the alignment permits."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.even_split import split_evenly


@pytest.mark.parametrize(
    ("length", "parts", "align", "bounds"),
    [
        (6, 3, 1, [(0, 2), (2, 4), (4, 6)]),
        (7, 3, 1, [(0, 3), (3, 5), (5, 7)]),
        (2, 3, 1, [(0, 1), (1, 2), (2, 2)]),
        (0, 2, 1, [(0, 0), (0, 0)]),
        (5, 1, 1, [(0, 5)]),
        (33, 2, 16, [(0, 32), (32, 33)]),
        (10, 3, 16, [(0, 10), (10, 10), (10, 10)]),
    ],
)
def test_split_evenly(length: int, parts: int, align: int, bounds: list[tuple[int, int]]) -> None:
    assert split_evenly(length, parts, align=align) == bounds


@given(st.integers(0, 2000), st.integers(1, 50), st.integers(1, 40))
def test_any_split_is_complete_and_even(length: int, parts: int, align: int) -> None:
    bounds = split_evenly(length, parts, align=align)
    assert len(bounds) == parts
    assert [bounds[0][0], bounds[-1][1]] == [0, length]
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    assert all(stop % align == 0 or stop == length for _, stop in bounds)
    sizes = [stop - start for start, stop in bounds]
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) < 2 * align  # at most 1 without alignment
