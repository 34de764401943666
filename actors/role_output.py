"""
What the actors of a run print: to the terminal, and to a file for each role.

    worker-0   print(...) ── Ray's log monitor ──▶ driver ──▶ (digits/worker-0 pid=17) ...
                                                        └──▶ logs/worker-0.log

Ray leaves out lines that several actors print alike, numbers aside; of training that hides the
losses of all ranks but one. Here each line appears once for each role that printed it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from distplat.actors import ray_compat

FOLDER = "logs"
RAYLET = "raylet"
_LOSS = "A worker died or was killed"
"""In what raylets print of a lost process: who was lost, and why, is told by the controller."""
_QUIET_S, _LONGEST_S, _TICK_S = 0.2, 1.0, 0.02
"""After the end: Ray looks for new lines ten times a second."""
_LARGEST = 32 * 2**20
"""Bytes of a file; then it becomes the role's `.log.1`, and what that had goes."""


class _RoleFile(RotatingFileHandler):
    """
    The file of one role.

    Args:
        path: of the file, which is made with its first line.
        failed: told of the first line that cannot be written.
    """

    def __init__(self, path: Path, failed: Callable[[OSError], None]) -> None:
        super().__init__(path, maxBytes=_LARGEST, backupCount=1, encoding="utf-8", delay=True)
        self._failed = failed

    def write(self, line: str) -> None:
        """Append a line."""
        self.emit(logging.makeLogRecord({"msg": line}))

    def handleError(self, record: logging.LogRecord) -> None:
        """Tell of the error that `emit` is in."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._failed(error)


class RoleFiles:
    """
    Files of what each role printed; the first that cannot be written is the last.

    Args:
        folder: where they are made.
        warn: told once, why there will be no more lines.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object]) -> None:
        self._folder, self._warn = folder, warn
        self._files: dict[str, _RoleFile] = {}
        self._failed = False

    def write(self, role: str, lines: list[str]) -> None:
        """Append what a role printed."""
        if self._failed:
            return
        file = self._files.get(role)
        if file is None:
            with suppress(OSError):  # the first line will say
                self._folder.mkdir(exist_ok=True)
            file = self._files[role] = _RoleFile(self._folder / f"{role}.log", self._fail)
        for line in lines:
            file.write(line)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            self._warn(f"what workers print is written to no file any more: {error}")

    def close(self) -> None:
        """Close them."""
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
    files = RoleFiles(folder / FOLDER, warn)
    # Who asks for it has Ray's own way, with its summary of lines that are alike.
    alike = shown and os.environ.get("RAY_DEDUP_LOGS") == "1"
    last = 0.0

    def take(batch: Mapping[str, Any]) -> bool:
        nonlocal last
        role = role_of(job, batch)
        if role is None:
            return False
        last = time.monotonic()
        files.write(role, list(batch["lines"]))
        if shown and not alike and role != RAYLET:
            ray_compat.print_batch(batch, colored=_colored())
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


def _colored() -> bool:
    if "NO_COLOR" in os.environ:
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and sys.stderr.isatty())
