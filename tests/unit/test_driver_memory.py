"""What the driver and the controller keep of a run does not grow with its steps."""

import gc
import tracemalloc
from pathlib import Path

import pytest
import synthetic_run

from distplat.actors import result
from distplat.platform import evaluations, progress

STEPS, SETTLED = 2_000, 1_000


@pytest.mark.sweep(2)
@pytest.mark.parametrize("leased", [False, True], ids=["in order", "leased"])
def test_memory_is_bounded(leased: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/chaos/long_run.py` shows it on ten million steps."""
    monkeypatch.setattr(result, "KEPT", 50)
    monkeypatch.setattr(evaluations, "_KEPT", 20)
    monkeypatch.setattr(progress, "_GIVEN", 20)
    bytes_at: dict[int, int] = {}

    def seen(step: int) -> None:
        if step in (SETTLED, STEPS):
            gc.collect()
            bytes_at[step] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        made = synthetic_run.run(tmp_path, STEPS, monkeypatch, seen, leased=leased)
    finally:
        tracemalloc.stop()
    assert made.totals.steps == STEPS
    grown = bytes_at[STEPS] - bytes_at[SETTLED]
    assert grown < 8 * (STEPS - SETTLED), "less than a pointer for each step"
