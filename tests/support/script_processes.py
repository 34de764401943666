"""A script that ends late, and waits for what it does."""

import time
from pathlib import Path


def gone(pid: int, limit_s: float = 30.0) -> bool:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def read(note: Path, limit_s: float = 30.0) -> list[int]:
    """Wait for a file with numbers of processes, the last of which is followed by a newline."""
    until = time.monotonic() + limit_s
    while not (note.exists() and note.read_text().endswith("\n")):
        assert time.monotonic() < until, "nobody has written it"
        time.sleep(0.02)
    return [int(word) for word in note.read_text().split()]


DEAF = """
trap "" TERM
sleep 999 > /dev/null 2>&1 &
setsid sleep 999 > /dev/null 2>&1 &
echo $$ $! $(jobs -p) > {note}
{then}
"""
"""A shell script with a child in its group, one in a session of its own; none hears SIGTERM."""
