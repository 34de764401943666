"""Split a length into nearly equal parts, such as a batch over ranks or a vector over shards."""

from collections.abc import Sequence


def snap_to_boundaries(
    bounds: Sequence[tuple[int, int]], boundaries: Sequence[int]
) -> list[tuple[int, int]]:
    """
    Move the inner bounds of ranges to the nearest allowed boundaries; a range may become empty.

    Args:
        bounds: consecutive ranges, from 0.
        boundaries: allowed inner bounds, ascending.
    """
    total = bounds[-1][1]
    allowed = [*boundaries, total]
    inner = [min(allowed, key=lambda at: abs(at - stop)) for _, stop in bounds[:-1]]
    ends = [*inner, total]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def split_evenly(length: int, parts: int, *, align: int = 1) -> list[tuple[int, int]]:
    """
    Return `parts` half-open ranges that cover 0..length in order, without gap or overlap.

    Sizes differ by less than 2 * `align`; where length < parts * align, the last may be empty.

    Args:
        length: the length to split, >= 0.
        parts: number of ranges, >= 1.
        align: every inner bound is a multiple of it.
    """
    blocks = -(-length // align)
    share, extra = divmod(blocks, parts)
    bounds, start = [], 0
    for part in range(parts):
        stop = start + share + (part < extra)
        bounds.append((min(start * align, length), min(stop * align, length)))
        start = stop
    return bounds
