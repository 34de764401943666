"""What the benchmarks share: rows of figures with ratios, medians of repeated runs."""

import statistics
from collections.abc import Callable, Sequence

WORKERS = 2


def median_ms(seconds: Sequence[float]) -> float:
    """Give the median in milliseconds."""
    return statistics.median(seconds) * 1e3


def print_ratio(what: str, ours: float, peer: float, goal: float, unit: str = "ms") -> None:
    """Print one comparison: ours, the peer's, their ratio, and the ratio to reach."""
    verdict = "reached" if ours <= goal * peer else "missed"
    print(
        f"{what:<44} ours {ours:9.2f} {unit}   peer {peer:9.2f} {unit}   "
        f"ratio {ours / peer:5.2f}x   goal <= {goal:.2f}x {verdict}",
        flush=True,
    )


def alternately(
    first: Callable[[], float], second: Callable[[], float], rounds: int
) -> tuple[float, float]:
    """Measure two things in turn, so that a drifting machine hits both; give the medians."""
    pairs = [(first(), second()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
