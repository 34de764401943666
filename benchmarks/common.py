"""Shared code of the benchmarks: rows with ratios, medians of repeated runs."""

import statistics
from collections.abc import Callable, Sequence

WORKERS = 2


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return statistics.median(seconds) * 1e3


def print_ratio(what: str, ours: float, peer: float, goal: float, unit: str = "ms") -> None:
    """Print one comparison: distplat, the peer, their ratio, and the goal for the ratio."""
    verdict = "reached" if ours <= goal * peer else "missed"
    print(
        f"{what:<44} ours {ours:9.2f} {unit}   peer {peer:9.2f} {unit}   "
        f"ratio {ours / peer:5.2f}x   goal <= {goal:.2f}x {verdict}",
        flush=True,
    )


def alternately(
    first: Callable[[], float], second: Callable[[], float], rounds: int
) -> tuple[float, float]:
    """Measure two functions alternately, so that drift affects both; return the medians."""
    pairs = [(first(), second()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
