"""
What the actors of a run print: to the terminal, and to a file for each role.

    worker-0   print(...) ── Ray's log monitor ──▶ driver ──▶ (digits/worker-0 pid=17) ...
                                                        └──▶ logs/worker-0.log

Ray leaves out lines that several actors print alike, numbers aside; of training that hides the
losses of all ranks but one. Here each line appears once for each role that printed it.
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
"""In what raylets print of a lost process: who was lost, and why, is told by the controller."""
_QUIET_S, _LONGEST_S, _TICK_S = 0.2, 1.0, 0.02
"""After the end: Ray looks for new lines ten times a second."""
_LARGEST = 32 * 2**20
"""Bytes of a file; then it becomes the role's `.log.1`, and what that had goes."""
_MOST = 1000
"""Batches of lines that may wait for the disk."""


class _RoleFile:
    """
    The file of one role, which is made with its first line.

    Args:
        path: of the file.
        largest: see `_LARGEST`; None: it grows.
    """

    def __init__(self, path: Path, largest: int | None) -> None:
        self._path, self._largest = path, largest
        self._records: RecordFile | None = None

    def write(self, text: str) -> None:
        """
        Append lines.

        Raises:
            OSError: the disk refuses.
        """
        record = text.encode(errors="replace")
        records = self._records
        if records is not None and self._largest and records.size + len(record) > self._largest:
            records.close()
            self._records = records = None
            self._path.replace(self._path.with_suffix(".log.1"))
        if records is None:
            with suppress(FileExistsError):  # if that is no folder, the next line says so
                self._path.parent.mkdir(FOLDER_MODE)
            self._records = records = RecordFile(self._path)
        records.write(record)

    def close(self) -> None:
        """Close it."""
        if self._records is not None:
            self._records.close()


class RoleFiles:
    """
    Log files of each role, written by a thread: a disk that hangs blocks no caller.

    Args:
        folder: where they are made.
        warn: told of lines that cannot be written.
        largest: see `_RoleFile`.
        most: calls of `write` that may wait for the disk.
    """

    def __init__(
        self,
        folder: Path,
        warn: Callable[[str], object],
        *,
        largest: int | None = None,
        most: int = _MOST,
    ) -> None:
        self._folder, self._largest = folder, largest
        self._files: dict[str, _RoleFile] = {}
        self._writer = BackgroundWriter(self._append, warn, most, "printed lines")

    def write(self, role: str, lines: Sequence[str]) -> None:
        """Append what a role printed."""
        self._writer.put((role, "".join(f"{line}\n" for line in lines)))

    def _append(self, printed: tuple[str, str]) -> None:
        role, text = printed
        if role not in self._files:
            self._files[role] = _RoleFile(self._folder / f"{role}.log", self._largest)
        self._files[role].write(text)

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Wait for what is to be written, within reason, and close them."""
        if self._writer.close(limit_s):
            for file in self._files.values():
                file.close()


@contextmanager
def role_output(
    job: str, folder: Path, warn: Callable[[str], object], *, shown: bool
) -> Iterator[None]:
    """
    Take what a run's actors print, while this block runs and until they have no more to say.

    Args:
        job: the run's; its actors' names begin with it.
        folder: the run directory.
        warn: told of files that cannot be written.
        shown: whether it is printed here as well.
    """
    files = RoleFiles(folder / FOLDER, warn, largest=_LARGEST)
    # Who asks for it has Ray's own way, with its summary of lines that are alike.
    alike = shown and os.environ.get("RAY_DEDUP_LOGS") == "1"
    last = 0.0

    def take(batch: Mapping[str, Any]) -> bool:
        nonlocal last
        role = role_of(job, batch)
        if role is None:
            return False
        last = time.monotonic()
        files.write(role, batch["lines"])
        if shown and not alike and role != RAYLET:
            ray_compat.print_batch(batch, colored=has_colors(sys.stdout, sys.stderr))
        return not alike

    try:
        with ray_compat.printed_by_actors(take):
            try:
                yield
            finally:  # what a worker that failed has printed comes then, too
                ended = time.monotonic()
                while time.monotonic() < min(max(last, ended) + _QUIET_S, ended + _LONGEST_S):
                    time.sleep(_TICK_S)
    finally:
        files.close()


def role_of(job: str, batch: Mapping[str, Any]) -> str | None:
    """
    Say whose lines these are; None: they are of no actor of the run.

    Args:
        job: its name.
        batch: as Ray's log monitor sends it.
    """
    name = str(batch.get("actor_name") or "")
    if name.startswith(f"{job}/"):
        return name.split("/")[1]  # an attempt may follow
    if batch.get("pid") == RAYLET and all(_LOSS in line for line in batch["lines"]):
        return RAYLET
    return None
