"""The memory of driver and controller does not grow with the number of steps."""

import gc
import subprocess
import sys
import tracemalloc
from pathlib import Path
from statistics import median

import pytest
import synthetic_run

from distplat.actors import result
from distplat.platform import evaluations, progress

STEPS, SETTLED, EVERY = 3_000, 1_000, 5
SUPPORT = Path(synthetic_run.__file__).parent


@pytest.mark.sweep(2)
@pytest.mark.parametrize("leased", [False, True], ids=["in order", "leased"])
def test_memory_is_bounded(leased: bool, tmp_path: Path) -> None:
    """
    In a separate process, because threads of other tests may allocate meanwhile.

    `tests/chaos/long_run.py` does the same with ten million steps.
    """
    code = f"import test_driver_memory as m; print(m.growth({leased}, {str(tmp_path)!r}))"
    path = [str(Path(__file__).parent), str(SUPPORT)]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {code}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert process.returncode == 0, process.stderr
    growth_bytes = float(process.stdout.splitlines()[-1])
    assert growth_bytes < 8 * (STEPS - SETTLED), "less than a pointer for each step"


def growth(leased: bool, folder: str) -> float:
    """Train, and return the growth in bytes between the steps after `SETTLED` and the last ones."""
    before, after = list[int](), list[int]()

    def sample(step: int) -> None:
        for samples, end in ((before, SETTLED), (after, STEPS)):
            if end - SETTLED // 2 < step <= end and step % EVERY == 0:
                gc.collect()
                samples.append(tracemalloc.get_traced_memory()[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "KEPT", 50)
        patch.setattr(evaluations, "_MAX_KEPT", 20)
        patch.setattr(progress, "_MAX_EMITTED", 20)
        tracemalloc.start()
        run = synthetic_run.run(Path(folder), STEPS, patch, sample, leased=leased)
    assert run.totals.steps == STEPS
    # Medians, because the thread that writes files may lag behind at any sample.
    return median(after) - median(before)
