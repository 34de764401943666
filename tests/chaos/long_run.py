"""
What the driver and the controller keep of a run of ten million steps, which nobody computes.

    long_run.py --steps 10000000        an hour and six gigabytes of disk on two cores
    long_run.py --leased                steps and evaluations in any order, as under ps-async

What hears of a step is the real one (`tests/support/synthetic_run.py`). Then `distplat report`,
`status`, `list` and `logs` look at the run that it leaves. Exits with 1 if memory grew by more than
16 MiB after the first tenth of the steps.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent.parent / "support")]

import synthetic_run

_ALLOWED = 16 * 2**20
COMMANDS = ("list", "status", "logs", "report")


def resident() -> int:
    """Give the bytes of this process's memory that are in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def look_at(run: Path) -> None:
    """Print how long the commands take that read a run, and how much memory."""
    for command in COMMANDS:
        name = [] if command == "list" else [run.name]
        began = time.monotonic()
        line = [sys.executable, "-m", "distplat.cli.main", command, *name]
        with subprocess.Popen(line, cwd=run.parent.parent, stdout=subprocess.DEVNULL) as child:
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        took = time.monotonic() - began
        print(f"{command:<8} {took:8.1f} s {used.ru_maxrss / 1024:8.0f} MiB, {child.returncode}")


def main() -> int:
    """Make the run; give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--leased", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="on a disk with room")
    given = parser.parse_args()
    settled, began, memory = given.steps // 10, time.monotonic(), list[int]()

    def seen(step: int) -> None:
        if step % settled == 0:
            memory.append(resident())
            passed = time.monotonic() - began
            print(f"{step:>10} steps {memory[-1] / 2**20:8.1f} MiB {passed:8.0f} s", flush=True)

    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        with pytest.MonkeyPatch.context() as patch:
            made = synthetic_run.run(folder / "runs", given.steps, patch, seen, leased=given.leased)
        assert made.totals.steps == given.steps, "each step is told once"
        for file in ("metrics.jsonl", "tensorboard"):
            found = [made.path / file, *(made.path / file).glob("*")]
            print(f"{file:<14} {sum(one.stat().st_size for one in found) / 2**20:8.0f} MiB")
        look_at(made.path)
    finally:
        shutil.rmtree(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = memory[-1] - memory[0]
    print(f"grown by {grown / 2**20:.1f} MiB after {settled} steps; at most {peak / 1024:.0f} MiB")
    return int(grown > _ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
