"""A script that ignores SIGTERM, and functions that wait for its processes."""

import time
from pathlib import Path


def has_exited(pid: int, limit_s: float = 30.0) -> bool:
    """Wait for the end of a process; return whether it ended in time."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # the latter if it ends during the read
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def read_pids(note: Path, limit_s: float = 30.0) -> list[int]:
    """Wait for a file with pids that ends with a newline; return the pids."""
    deadline = time.monotonic() + limit_s
    while not (note.exists() and note.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{note} was not written"
        time.sleep(0.02)
    return [int(word) for word in note.read_text().split()]


IGNORES_SIGTERM = """
trap "" TERM
sleep 999 > /dev/null 2>&1 &
setsid sleep 999 > /dev/null 2>&1 &
echo $$ $! $(jobs -p) > {note}
{then}
"""
"""A shell script that ignores SIGTERM, with a child in its group and one in a new session."""
