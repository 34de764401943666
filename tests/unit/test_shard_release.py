"""When shards' parts of a gradient may leave, and how much of their way backward hid."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.strategies.algorithms.shard_release import ShardRelease, covered

FOUR = [(0, 10), (10, 15), (15, 25), (25, 30)]
"""Of three shards of ten elements: parameter 2 lies in two of them."""
THREE = [(0, 10), (10, 20), (20, 30)]


def watched(parameters: list[tuple[int, int]], shards: list[tuple[int, int]]) -> ShardRelease:
    """Give one that has seen a whole backward, and expects the next."""
    release = ShardRelease(parameters, shards)
    for number in range(len(parameters)):
        assert release.gradient(number) == []
    assert release.rest() == [*range(len(shards))]
    release.begin()
    return release


def backward(release: ShardRelease, news: list[int]) -> tuple[list[int], list[int]]:
    """Give what left while the gradients came, and what is left at the end."""
    early: list[int] = []
    for parameter in news:
        for number in release.gradient(parameter):
            early.append(number)
            release.leave(number)
    return early, release.rest()


@pytest.mark.parametrize(
    ("news", "early", "rest"),
    [
        pytest.param([3, 2, 1, 0], [2, 1], [0], id="from-the-end"),
        pytest.param([0, 1, 2, 3], [0, 1], [2], id="from-the-beginning"),
        pytest.param([2, 3, 1, 0], [2, 1], [0], id="the-straddler-first"),
        pytest.param([3, 1, 2, 0], [1, 2], [0], id="the-straddler-completes-both"),
        pytest.param([0, 3, 1, 2], [0, 1], [2], id="only-one-of-two-that-are-left"),
        pytest.param([3, 1, 0], [0], [1, 2], id="one-without-a-gradient"),
        pytest.param([3, 2], [2], [0, 1], id="half-of-the-model"),
        pytest.param([], [], [0, 1, 2], id="nothing"),
    ],
)
def test_what_leaves_when(news: list[int], early: list[int], rest: list[int]) -> None:
    assert backward(watched(FOUR, THREE), news) == (early, rest)


def test_a_parameter_has_left_when_one_of_its_shards_has() -> None:
    release = watched(FOUR, THREE)
    backward(release, [3, 2])
    assert [release.has_left(number) for number in range(4)] == [False, False, True, True]
    release.begin()
    assert not release.has_left(2)


def test_what_does_not_leave_is_not_gone() -> None:
    release = watched(FOUR, THREE)
    assert release.gradient(3) == [] and release.gradient(2) == [2]
    assert not release.has_left(3)
    assert release.rest() == [0, 1, 2]


def test_gradients_that_come_again_hold_their_shards_ever_after() -> None:
    release = ShardRelease(FOUR, THREE)
    assert backward(release, [3, 2, 1, 1, 0]) == ([], [0, 1, 2])
    for _ in range(2):
        release.begin()
        assert backward(release, [3, 2, 1, 0]) == ([2, 0], [1])


def test_a_backward_without_gradients_teaches_nothing() -> None:
    release = ShardRelease(FOUR, THREE)
    assert release.rest() == [0, 1, 2]
    release.begin()
    assert backward(release, [3, 2, 1, 0]) == ([], [0, 1, 2])


def test_shards_without_parameters_and_a_single_one() -> None:
    assert backward(watched([(0, 4)], [(0, 4), (4, 4)]), [0]) == ([0], [1])
    assert backward(watched([(0, 4), (4, 8)], [(0, 8)]), [1, 0]) == ([], [0])


@given(st.data())
def test_every_shard_leaves_once_and_complete(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    parameters = list(zip([0, *ends], ends, strict=False))
    cuts = sorted(data.draw(st.lists(st.integers(0, ends[-1]), max_size=5)))
    shards = list(zip([0, *cuts], [*cuts, ends[-1]], strict=True))
    release = watched(parameters, shards)
    for _ in range(2):
        order = data.draw(st.permutations(range(len(sizes))))
        news = order[: data.draw(st.integers(0, len(order)))]
        early: list[int] = []
        for count, parameter in enumerate(news, 1):
            for number in release.gradient(parameter):
                start, stop = shards[number]
                inside = {p for p, (a, b) in enumerate(parameters) if max(a, start) < min(b, stop)}
                assert inside <= set(news[:count])
                release.leave(number)
                early.append(number)
        rest = release.rest()
        assert rest, "one is always left for the end"
        assert sorted(early + rest) == [*range(len(shards))]
        release.begin()


@pytest.mark.parametrize(
    ("spans", "end", "expected"),
    [
        ([], 5.0, 0.0),
        ([(1.0, 3.0)], 5.0, 2.0),
        ([(1.0, 9.0)], 5.0, 4.0),
        ([(6.0, 9.0)], 5.0, 0.0),
        ([(2.0, 4.0), (1.0, 3.0)], 5.0, 3.0),
        ([(1.0, 2.0), (3.0, 9.0)], 5.0, 3.0),
        ([(1.0, 4.0), (2.0, 3.0)], 5.0, 3.0),
    ],
)
def test_time_under_way_before_the_end(
    spans: list[tuple[float, float]], end: float, expected: float
) -> None:
    assert covered(spans, end) == expected
