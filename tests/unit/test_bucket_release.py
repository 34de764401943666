"""`cut_buckets`, and the order in which `Release` sends buckets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.strategies.algorithms.buckets import Release, cut_buckets


def bounds(offsets: list[int], size: int, limit: int, first: int) -> list[tuple[int, int]]:
    return [(b.start, b.stop) for b in cut_buckets(offsets, size, limit, first)]


@pytest.mark.parametrize(
    ("offsets", "limit", "first", "expected"),
    [
        ([0], 10, 10, [(0, 100)]),
        ([0, 40, 80], 1, 1, [(80, 100), (40, 80), (0, 40)]),
        ([0, 40, 80], 1000, 1000, [(0, 100)]),
        ([0, 40, 80], 1000, 20, [(80, 100), (0, 80)]),
        ([0, 40, 80], 60, 21, [(40, 100), (0, 40)]),
        ([0, 10, 20, 30], 20, 70, [(30, 100), (10, 30), (0, 10)]),
        ([0, 10, 20, 30, 90], 20, 1, [(90, 100), (30, 90), (10, 30), (0, 10)]),
    ],
)
def test_cut_buckets(
    offsets: list[int], limit: int, first: int, expected: list[tuple[int, int]]
) -> None:
    assert bounds(offsets, 100, limit, first) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 50), st.integers(0, 50))
def test_buckets_cover_the_vector_once(sizes: list[int], limit: int, first: int) -> None:
    offsets = [sum(sizes[:place]) for place in range(len(sizes))]
    buckets = cut_buckets(offsets, sum(sizes), limit, first)
    assert [b.start for b in buckets[:-1]] == [b.stop for b in buckets[1:]]
    assert (buckets[-1].start, buckets[0].stop) == (0, sum(sizes))
    for bucket in buckets:
        assert bucket.start == offsets[bucket.parameters[0]]
        min_size = limit if bucket is not buckets[0] else min(first, limit)
        size_limit = max(1, min_size) + sizes[bucket.parameters[0]]
        assert bucket.stop - bucket.start < size_limit
        assert bucket.stop - bucket.start >= min_size or bucket is buckets[-1]
    parameters = [p for b in reversed(buckets) for p in b.parameters]
    assert parameters == list(range(len(sizes)))


def release_with_order(members: list[list[int]], order: list[int], held: list[bool]) -> Release:
    release = Release(members)
    release.agree(order, held)
    release.begin()
    return release


def test_bucket_is_sent_when_complete_and_after_its_predecessors() -> None:
    release = release_with_order([[4, 5], [2, 3], [0, 1]], [0, 2, 1], [False] * 3)
    assert [release.gradient(p) for p in (0, 5, 1)] == [[], [], []]
    assert not release.was_sent(0)
    assert release.gradient(4) == [0, 2]
    assert release.was_sent(0) and release.was_sent(5) and not release.was_sent(3)
    assert release.gradient(2) == []
    assert release.rest() == [1]
    assert release.rest() == []


def test_sends_nothing_before_the_order_is_agreed() -> None:
    release = Release([[1], [0]])
    assert [release.gradient(p) for p in (0, 1)] == [[], []]
    assert release.rest() == [0, 1]
    assert release.proposal() == ([1, 0], [False, False])


def test_held_bucket_is_sent_at_the_end() -> None:
    release = release_with_order([[2], [1], [0]], [2, 0, 1], [False, True, False])
    assert [release.gradient(p) for p in (2, 1)] == [[], []]
    assert release.gradient(0) == [2]
    assert release.rest() == [0, 1]


def test_begin_resets_the_step() -> None:
    release = release_with_order([[1], [0]], [0, 1], [False, False])
    for _ in range(2):
        release.begin()
        assert release.gradient(1) == [0]
        assert release.rest() == [1]


def test_proposed_order_follows_the_last_gradient_of_each_bucket() -> None:
    release = Release([[4, 5], [2, 3], [0, 1]])
    for parameter in (5, 3, 2, 0, 1, 4):
        release.gradient(parameter)
    assert release.proposal() == ([1, 2, 0], [False] * 3)


def test_proposal_holds_buckets_with_missing_or_repeated_gradients() -> None:
    release = Release([[5], [4], [2, 3], [0, 1]])
    for parameter in (5, 2, 0, 4, 5, 1):
        release.gradient(parameter)
    assert release.proposal() == ([1, 3, 0, 2], [False, False, True, True])


def test_no_proposal_without_gradients() -> None:
    assert Release([[0]]).proposal() is None


@given(st.data())
def test_sends_every_bucket_once_in_order_and_complete(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
    numbers = iter(range(sum(sizes)))
    members = [[next(numbers) for _ in range(size)] for size in sizes]
    order = data.draw(st.permutations(range(len(sizes))))
    held = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    arrivals = data.draw(st.permutations(range(sum(sizes))))
    used = arrivals[: data.draw(st.integers(0, len(arrivals)))]
    release = release_with_order(members, order, held)
    sent: list[int] = []
    for count, parameter in enumerate(used, 1):
        released = release.gradient(parameter)
        assert all(set(members[number]) <= set(used[:count]) for number in released)
        sent += released
    assert not {number for number, h in zip(order, held, strict=True) if h} & set(sent)
    assert sent + release.rest() == order
