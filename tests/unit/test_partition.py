"""Partition of layers into stages: the cheapest cut and, of these, the most even."""

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distplat.strategies.algorithms.partition import bounds, partition

COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=9)


def stages(costs: Sequence[float], points: Sequence[int]) -> list[float]:
    return [sum(costs[start:stop]) for start, stop in bounds(points, len(costs))]


def all_cuts(layers: int, parts: int) -> list[tuple[int, ...]]:
    return list(combinations(range(1, layers), parts - 1))


@settings(deadline=None)
@given(COSTS, st.data())
def test_partition_is_optimal(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    found = stages(costs, partition(costs, parts))
    others = [stages(costs, points) for points in all_cuts(len(costs), parts)]
    assert max(found) == min(map(max, others))
    cheapest = [other for other in others if max(other) == max(found)]
    assert sum(x * x for x in found) == min(sum(x * x for x in other) for other in cheapest)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.data())
def test_partition_of_fractional_costs_is_optimal(costs: list[float], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    found = max(stages(costs, partition(costs, parts)))
    best = min(max(stages(costs, points)) for points in all_cuts(len(costs), parts))
    assert found == pytest.approx(best, abs=1e-6)


@settings(deadline=None)
@given(COSTS, st.data())
def test_partition_with_limits_is_optimal(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    memory = data.draw(st.lists(st.integers(0, 9), min_size=len(costs), max_size=len(costs)))
    limits = data.draw(st.lists(st.integers(0, 40), min_size=parts, max_size=parts))

    def fits(k: int, start: int, stop: int) -> bool:
        return sum(memory[start:stop]) <= limits[k]

    fitting = [
        points
        for points in all_cuts(len(costs), parts)
        if all(fits(k, *ends) for k, ends in enumerate(bounds(points, len(costs))))
    ]
    if not fitting:
        with pytest.raises(ValueError, match=r"into . stages fits: use more stages"):
            partition(costs, parts, fits)
        return
    points = partition(costs, parts, fits)
    assert tuple(points) in fitting
    assert max(stages(costs, points)) == min(max(stages(costs, other)) for other in fitting)


def test_partition_example() -> None:
    costs = [3, 1, 4, 1, 5, 9, 2, 6]
    assert partition(costs, 4) == [3, 5, 6]
    assert stages(costs, [3, 5, 6]) == [8, 6, 9, 8]


def test_cheap_stages_are_even() -> None:
    assert partition([9, 1, 1, 1, 1], 3) == [1, 3]


def test_stages_exceed_the_mean_by_at_most_one_layer() -> None:
    costs = [5, 2, 7, 1, 1, 6, 3, 3, 2, 8, 4, 4]
    for parts in range(1, 7):
        found = stages(costs, partition(costs, parts))
        assert max(found) - sum(costs) / parts <= max(costs)


def test_layers_of_zero_cost_fill_stages() -> None:
    assert partition([0, 0, 0], 3) == [1, 2]


@pytest.mark.parametrize("parts", [0, 4])
def test_invalid_number_of_stages_is_rejected(parts: int) -> None:
    with pytest.raises(ValueError, match=f"3 layers cannot be cut into {parts} .*use 1 to 3"):
        partition([1, 2, 3], parts)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_invalid_cost_is_rejected(cost: float) -> None:
    with pytest.raises(ValueError, match="layer 1 costs"):
        partition([1, cost], 2)


@pytest.mark.parametrize("points", [[0], [3], [2, 2], [2, 1], [-1]])
def test_cut_points_of_an_empty_stage_are_rejected(points: list[int]) -> None:
    with pytest.raises(ValueError, match="must be ascending, each from 1 to 2"):
        bounds(points, 3)


def test_bounds() -> None:
    assert bounds([1], 3) == [(0, 1), (1, 3)]
    assert bounds([], 2) == [(0, 2)]
