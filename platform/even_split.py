"""Cut a length into nearly equal parts: batches over ranks, parameters over shards, ring chunks."""

from collections.abc import Sequence


def snap_to_boundaries(
    bounds: Sequence[tuple[int, int]], boundaries: Sequence[int]
) -> list[tuple[int, int]]:
    """
    Move the bounds between ranges to the nearest of some boundaries; a range may be left empty.

    Args:
        bounds: ranges that follow each other, from 0.
        boundaries: where they may end, beside the last one's end; they rise.
    """
    total = bounds[-1][1]
    allowed = [*boundaries, total]
    inner = [min(allowed, key=lambda at: abs(at - stop)) for _, stop in bounds[:-1]]
    ends = [*inner, total]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def split_evenly(length: int, parts: int, *, align: int = 1) -> list[tuple[int, int]]:
    """
    Give `parts` half-open ranges that cover 0..length in order, without gap or overlap.

    Sizes differ by less than 2 * `align`; where length < parts * align, the last may be empty.

    Args:
        length: what is cut, >= 0.
        parts: how many ranges, >= 1.
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
