"""A few trials of the fault grid (`tests/chaos/`) on real processes."""

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parent.parent / "chaos"
GRID = CHAOS / "chaos_grid.py"
ROWS = ("F5", "F11", "F13", "F14", "F25", "B1", "B2")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_fault_grid_models_are_bit_identical(tmp_path: Path) -> None:
    rows = [word for row in ROWS for word in ("--row", row)]
    only = ["--strategy", "ring", "--strategy", "ps-sync", "--folder", str(tmp_path / "grid")]
    completed = subprocess.run(
        [sys.executable, str(GRID), *rows, *only], capture_output=True, text=True, timeout=550
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", ["1", "12"], ids=["task", "train function"])
def test_random_faults_in_memory(seed: str, tmp_path: Path) -> None:
    script = str(CHAOS / "chaos_memory.py")
    command = [sys.executable, script, "--minutes", "0.3", "--seed", seed]
    completed = subprocess.run(
        [*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=550
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "| wrong | 0 | 0 | 0 | 0 | 0 |" in completed.stdout
