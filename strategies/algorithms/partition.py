"""
Partition a sequence of layers into stages so that the largest stage cost is minimal.

    costs   3  1  4 | 1  5 | 9 | 2  6      4 stages: 8, 6, 9, 8; no cut has a smaller maximum

This is the block partition of Bárány & Grinberg (Israel J. Math. 206, 2015), which torchgpipe uses
to balance stages (Kim et al. 2020). They prove that stage costs need not differ by more than the
largest layer cost; here the exact optimum is computed, by dynamic programming over stage ends:

    best(k, j) = min over i < j of max(best(k - 1, i), cost of layers i..j-1)       O(parts n^2)

Many cuts share that optimum, since it depends on the largest stage only. A second pass selects the
most even of them: the smallest sum of squares among cuts with the same maximum.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import inf, isfinite

Fits = Callable[[int, int, int], bool]
"""(k, start, stop) -> whether stage k can hold the layers start..stop-1."""

_Merge = Callable[[float, float], float]


def partition(costs: Sequence[float], parts: int, fits: Fits | None = None) -> list[int]:
    """
    Partition layers into contiguous non-empty stages, minimising the largest stage cost.

    Args:
        costs: of each layer, >= 0, in any unit.
        parts: number of stages.
        fits: constraint on stages, such as memory; None: no constraint.

    Returns:
        The cut points: parts - 1 ascending numbers; stage k starts with layer points[k - 1].

    Raises:
        ValueError: no cut satisfies the constraint, or a cost is not a number >= 0.
    """
    check_costs(costs)
    if not 1 <= parts <= len(costs):
        raise ValueError(
            f"{len(costs)} layers cannot be cut into {parts} stages: "
            f"use 1 to {len(costs)} stages, or split layers"
        )
    sums = [0.0, *accumulate(costs)]
    allowed = fits or (lambda k, start, stop: True)

    def cost(k: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] if allowed(k, start, stop) else inf

    largest, _ = _best(cost, max, parts, len(costs))
    if largest == inf:
        raise ValueError(
            f"no cut of {len(costs)} layers into {parts} stages fits: use more stages, smaller "
            "micro-batches, or activation recomputation"
        )

    def square(k: int, start: int, stop: int) -> float:
        stage_cost = cost(k, start, stop)
        return inf if stage_cost > largest else stage_cost * stage_cost

    _, points = _best(square, lambda before, last: before + last, parts, len(costs))
    return points


def _best(
    cost: Callable[[int, int, int], float], merge: _Merge, parts: int, layers: int
) -> tuple[float, list[int]]:
    """Return the smallest merged cost of a cut, and its cut points."""
    best = [0.0] + [inf] * layers  # cost of the stages so far, by their last layer's end
    starts_by_stage: list[list[int]] = []
    for k in range(parts):
        row, starts = [inf] * (layers + 1), [0] * (layers + 1)
        for stop in range(k + 1, layers - (parts - 1 - k) + 1):
            for start in range(stop - 1, k - 1, -1):
                value = merge(best[start], cost(k, start, stop)) if best[start] < inf else inf
                if value < row[stop]:
                    row[stop], starts[stop] = value, start
        best = row
        starts_by_stage.append(starts)
    points, stop = [], layers
    for starts in reversed(starts_by_stage):
        stop = starts[stop]
        points.append(stop)
    return best[layers], points[-2::-1]


def check_costs(costs: Sequence[float]) -> None:
    """
    Validate the costs of layers.

    Raises:
        ValueError: one is negative, infinite or not a number; names its layer.
    """
    for layer, cost in enumerate(costs):
        if not isfinite(cost) or cost < 0:
            raise ValueError(f"layer {layer} costs {cost}: a cost is a number >= 0")


def bounds(points: Sequence[int], layers: int) -> list[tuple[int, int]]:
    """
    Return the stages (start, stop) of cut points.

    Raises:
        ValueError: the points are not strictly ascending, or leave a stage without layers.
    """
    ends = [0, *points, layers]
    if any(left >= right for left, right in pairwise(ends)):
        raise ValueError(
            f"cut points {list(points)} of {layers} layers: they must be "
            f"ascending, each from 1 to {layers - 1}, so that no stage is empty"
        )
    return list(pairwise(ends))
