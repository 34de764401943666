"""What the driver and the controller keep of a run does not grow with its steps."""

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
    In a process of its own: here threads of other tests may allocate meanwhile.

    `tests/chaos/long_run.py` shows it on ten million steps.
    """
    code = f"import test_driver_memory as m; print(m.growth({leased}, {str(tmp_path)!r}))"
    path = [str(Path(__file__).parent), str(SUPPORT)]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {code}"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert made.returncode == 0, made.stderr
    grown = float(made.stdout.splitlines()[-1])
    assert grown < 8 * (STEPS - SETTLED), "less than a pointer for each step"


def growth(leased: bool, folder: str) -> float:
    """Make a run, and give the bytes by which memory grows between its settled and last steps."""
    before, after = list[int](), list[int]()

    def seen(step: int) -> None:
        for found, end in ((before, SETTLED), (after, STEPS)):
            if end - SETTLED // 2 < step <= end and step % EVERY == 0:
                gc.collect()
                found.append(tracemalloc.get_traced_memory()[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "KEPT", 50)
        patch.setattr(evaluations, "_MAX_KEPT", 20)
        patch.setattr(progress, "_MAX_EMITTED", 20)
        tracemalloc.start()
        made = synthetic_run.run(Path(folder), STEPS, patch, seen, leased=leased)
    assert made.totals.steps == STEPS
    # Not of one moment each: a thread that writes files may be behind at any.
    return median(after) - median(before)
