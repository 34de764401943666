"""
Cut a row of layers into stages so that the most expensive stage is as cheap as can be.

    costs   3  1  4 | 1  5 | 9 | 2  6      4 stages: 8, 6, 9, 8; no cut has a cheaper dearest stage

This is the block partition of Bárány & Grinberg (Israel J. Math. 206, 2015), which torchgpipe uses
to balance stages (Kim et al. 2020). Their bound says that sizes need not differ by more than the
dearest layer; here it is the exact optimum, by dynamic programming over the ends of the stages:

    best(k, j) = min over i < j of max(best(k - 1, i), cost of layers i..j-1)       O(parts n^2)

Many cuts share that optimum, for only its dearest stage counts. A second pass takes the most even
one of them: the least sum of squares among the cuts in which no stage is dearer.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import inf, isfinite

Fits = Callable[[int, int, int], bool]
"""Whether stage k can hold the layers start..stop-1; asked as (k, start, stop)."""

_Merge = Callable[[float, float], float]


def partition(costs: Sequence[float], parts: int, fits: Fits | None = None) -> list[int]:
    """
    Cut layers into contiguous stages of one layer or more, minimising the dearest stage.

    Args:
        costs: of each layer, >= 0, in any unit.
        parts: number of stages.
        fits: refuses what a stage cannot hold, such as more than its memory; None: all fits.

    Returns:
        The cut points: parts - 1 numbers, rising; the stage k begins with layer points[k - 1].

    Raises:
        ValueError: there is no such cut, or a cost is no number >= 0.
    """
    check_costs(costs)
    if not 1 <= parts <= len(costs):
        raise ValueError(
            f"{len(costs)} layers cannot be cut into {parts} stages: "
            f"take 1 to {len(costs)} stages, or split layers"
        )
    sums = [0.0, *accumulate(costs)]
    allowed = fits or (lambda k, start, stop: True)

    def cost(k: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] if allowed(k, start, stop) else inf

    dearest, _ = _best(cost, max, parts, len(costs))
    if dearest == inf:
        raise ValueError(
            f"no cut of {len(costs)} layers into {parts} stages fits: take more stages, smaller "
            "micro-batches, or activation recomputation"
        )

    def square(k: int, start: int, stop: int) -> float:
        whole = cost(k, start, stop)
        return inf if whole > dearest else whole * whole

    _, points = _best(square, lambda before, last: before + last, parts, len(costs))
    return points


def _best(
    cost: Callable[[int, int, int], float], merge: _Merge, parts: int, layers: int
) -> tuple[float, list[int]]:
    """Give the least merged cost of a cut, and its cut points."""
    best = [0.0] + [inf] * layers  # of the stages so far, by the layer at which they end
    begins: list[list[int]] = []
    for k in range(parts):
        row, begin = [inf] * (layers + 1), [0] * (layers + 1)
        for stop in range(k + 1, layers - (parts - 1 - k) + 1):
            for start in range(stop - 1, k - 1, -1):
                value = merge(best[start], cost(k, start, stop)) if best[start] < inf else inf
                if value < row[stop]:
                    row[stop], begin[stop] = value, start
        best = row
        begins.append(begin)
    points, stop = [], layers
    for begin in reversed(begins):
        stop = begin[stop]
        points.append(stop)
    return best[layers], points[-2::-1]


def check_costs(costs: Sequence[float]) -> None:
    """
    Refuse costs that cannot be compared or added.

    Raises:
        ValueError: one is negative, infinite or not a number; names its layer.
    """
    for layer, cost in enumerate(costs):
        if not isfinite(cost) or cost < 0:
            raise ValueError(f"layer {layer} costs {cost}: a cost is a number >= 0")


def bounds(points: Sequence[int], layers: int) -> list[tuple[int, int]]:
    """
    Give the stages (start, stop) of cut points, whoever chose them.

    Raises:
        ValueError: the points do not rise, or leave a stage without layers.
    """
    ends = [0, *points, layers]
    if any(left >= right for left, right in pairwise(ends)):
        raise ValueError(
            f"cut points {list(points)} of {layers} layers: they must rise, "
            f"each from 1 to {layers - 1}, so that no stage is empty"
        )
    return list(pairwise(ends))
