"""
Output of a run's actors: forwarded to the terminal, and written to one file per role.

    worker-0   print(...) ── Ray's log monitor ──▶ driver ──▶ (digits/worker-0 pid=17) ...
                                                        └──▶ logs/worker-0.log

Ray deduplicates lines that differ in numbers only, which would hide the losses of all ranks but
one. In this module, each line appears once for each role that printed it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distplat.actors import ray_compat
from distplat.actors.view import has_colors
from distplat.platform.disk import CLOSE_S, FOLDER_MODE, BackgroundWriter, RecordFile

FOLDER = "logs"
RAYLET = "raylet"
_LOSS = "A worker died or was killed"
"""In a raylet's message about a lost process, which the controller reports with more detail."""
_QUIET_S, _MAX_WAIT_S, _TICK_S = 0.2, 1.0, 0.02
"""After the end of a run, Ray checks for new lines ten times a second."""
_MAX_BYTES = 32 * 2**20
"""Maximum bytes of a file, which is then renamed to `.log.1`; the previous `.log.1` is deleted."""
_MAX_PENDING = 1000
"""Maximum number of batches of lines that wait for the disk."""


class _RoleFile:
    """
    Log file of one role, created with the first line.

    Args:
        path: path of the file.
        max_bytes: see `_MAX_BYTES`; None: unlimited.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self._path, self._largest = path, max_bytes
        self._records: RecordFile | None = None

    def write(self, text: str) -> None:
        """
        Append lines.

        Raises:
            OSError: the write failed.
        """
        record = text.encode(errors="replace")
        records = self._records
        if records is not None and self._largest and records.size + len(record) > self._largest:
            records.close()
            self._records = records = None
            self._path.replace(self._path.with_suffix(".log.1"))
        if records is None:
            with suppress(FileExistsError):  # the next line raises if this is not a folder
                self._path.parent.mkdir(FOLDER_MODE)
            self._records = records = RecordFile(self._path)
        records.write(record)

    def close(self) -> None:
        """Close the file."""
        if self._records is not None:
            self._records.close()


class RoleFiles:
    """
    Log files of all roles, written by a background thread, so that a slow disk blocks no caller.

    Args:
        folder: folder of the files.
        warn: called with a message if lines cannot be written.
        max_bytes: see `_RoleFile`.
        max_pending: maximum number of `write` calls that wait for the disk.
    """

    def __init__(
        self,
        folder: Path,
        warn: Callable[[str], object],
        *,
        max_bytes: int | None = None,
        max_pending: int = _MAX_PENDING,
    ) -> None:
        self._folder, self._largest = folder, max_bytes
        self._files: dict[str, _RoleFile] = {}
        self._writer = BackgroundWriter(self._append, warn, max_pending, "printed lines")

    def write(self, role: str, lines: Sequence[str]) -> None:
        """Append lines of a role."""
        self._writer.put((role, "".join(f"{line}\n" for line in lines)))

    def _append(self, printed: tuple[str, str]) -> None:
        role, text = printed
        if role not in self._files:
            self._files[role] = _RoleFile(self._folder / f"{role}.log", self._largest)
        self._files[role].write(text)

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Wait for pending lines up to a deadline, and close the files."""
        if self._writer.close(limit_s):
            for file in self._files.values():
                file.close()


@contextmanager
def role_output(
    job: str, folder: Path, warn: Callable[[str], object], *, shown: bool
) -> Iterator[None]:
    """
    Collect the output of a run's actors during this block, and until no more lines arrive.

    Args:
        job: prefix of the names of the run's actors.
        folder: the run directory.
        warn: called with a message if a file cannot be written.
        shown: whether the output is printed as well.
    """
    files = RoleFiles(folder / FOLDER, warn, max_bytes=_MAX_BYTES)
    # On request, Ray's own deduplication prints the lines.
    deduplicated = shown and os.environ.get("RAY_DEDUP_LOGS") == "1"
    last = 0.0

    def handle(batch: Mapping[str, Any]) -> bool:
        nonlocal last
        role = role_of(job, batch)
        if role is None:
            return False
        last = time.monotonic()
        files.write(role, batch["lines"])
        if shown and not deduplicated and role != RAYLET:
            ray_compat.print_batch(batch, colored=has_colors(sys.stdout, sys.stderr))
        return not deduplicated

    try:
        with ray_compat.printed_by_actors(handle):
            try:
                yield
            finally:  # the last lines of a failed worker arrive after its failure
                ended = time.monotonic()
                while time.monotonic() < min(max(last, ended) + _QUIET_S, ended + _MAX_WAIT_S):
                    time.sleep(_TICK_S)
    finally:
        files.close()


def role_of(job: str, batch: Mapping[str, Any]) -> str | None:
    """
    Return the role that printed a batch of lines; None: not an actor of the run.

    Args:
        job: prefix of the names of the run's actors.
        batch: batch as sent by Ray's log monitor.
    """
    name = str(batch.get("actor_name") or "")
    if name.startswith(f"{job}/"):
        return name.split("/")[1]  # a third part may name the attempt
    if batch.get("pid") == RAYLET and all(_LOSS in line for line in batch["lines"]):
        return RAYLET
    return None
