"""What the driver and the controller keep of a run does not grow with its steps."""

import gc
import tracemalloc
from pathlib import Path
from statistics import median

import pytest
import synthetic_run

from distplat.actors import result
from distplat.platform import evaluations, progress

STEPS, SETTLED, EVERY = 5_000, 1_000, 5


@pytest.mark.sweep(2)
@pytest.mark.parametrize("leased", [False, True], ids=["in order", "leased"])
def test_memory_is_bounded(leased: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/chaos/long_run.py` shows it on ten million steps."""
    monkeypatch.setattr(result, "KEPT", 50)
    monkeypatch.setattr(evaluations, "_KEPT", 20)
    monkeypatch.setattr(progress, "_GIVEN", 20)
    before, after = list[int](), list[int]()

    def seen(step: int) -> None:
        for found, end in ((before, SETTLED), (after, STEPS)):
            if end - SETTLED // 2 < step <= end and step % EVERY == 0:
                gc.collect()
                found.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        made = synthetic_run.run(tmp_path, STEPS, monkeypatch, seen, leased=leased)
    finally:
        tracemalloc.stop()
    assert made.totals.steps == STEPS
    # Not of one moment each: a thread that writes files may be behind at any.
    grown = median(after) - median(before)
    assert grown < 8 * (STEPS - SETTLED), "less than a pointer for each step"
