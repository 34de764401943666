"""
Memory of the driver and the controller in a synthetic run of ten million steps.

    long_run.py --steps 10000000        an hour and six gigabytes of disk on two cores
    long_run.py --leased                steps and evaluations in any order, as under ps-async

Only the ranks are replaced (`tests/support/synthetic_run.py`). Afterwards `distplat report`,
`status`, `list` and `logs` read the run directory. Exits with 1 if memory grew by more than 16 MiB
after the first tenth of the steps.
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

_MAX_GROWTH = 16 * 2**20
COMMANDS = ("list", "status", "logs", "report")


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_commands(run: Path) -> None:
    """Print duration and memory of the commands that read a run."""
    for command in COMMANDS:
        name = [] if command == "list" else [run.name]
        start = time.monotonic()
        line = [sys.executable, "-m", "distplat.cli.main", command, *name]
        with subprocess.Popen(line, cwd=run.parent.parent, stdout=subprocess.DEVNULL) as child:
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        duration = time.monotonic() - start
        print(
            f"{command:<8} {duration:8.1f} s {used.ru_maxrss / 1024:8.0f} MiB, {child.returncode}"
        )


def main() -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--leased", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="on a disk with room")
    args = parser.parse_args()
    tenth, start, memory = args.steps // 10, time.monotonic(), list[int]()

    def on_step(step: int) -> None:
        if step % tenth == 0:
            memory.append(resident_bytes())
            elapsed = time.monotonic() - start
            print(f"{step:>10} steps {memory[-1] / 2**20:8.1f} MiB {elapsed:8.0f} s", flush=True)

    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        with pytest.MonkeyPatch.context() as patch:
            result = synthetic_run.run(
                folder / "runs", args.steps, patch, on_step, leased=args.leased
            )
        assert result.totals.steps == args.steps, "each step is reported once"
        for file in ("metrics.jsonl", "tensorboard"):
            found = [result.path / file, *(result.path / file).glob("*")]
            print(f"{file:<14} {sum(path.stat().st_size for path in found) / 2**20:8.0f} MiB")
        measure_commands(result.path)
    finally:
        shutil.rmtree(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    growth = memory[-1] - memory[0]
    print(f"grown by {growth / 2**20:.1f} MiB after {tenth} steps; at most {peak / 1024:.0f} MiB")
    return int(growth > _MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
