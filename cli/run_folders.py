"""
Runs by their directories below `runs/`: for `list` and `logs` of what no job API has.

A run that `distplat submit` or `Trainer.fit` made here is known by its directory alone once it has
ended. What the directory says is shown as the job API's jobs are.
"""

import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from distplat.platform.disk import open_regular
from distplat.platform.errors import DistplatError, SpecError, naming_path
from distplat.platform.run_record import MAX_LINE_BYTES, RunRecord, find_run, read_run
from distplat.platform.run_report import status_of

HOME = Path("runs")
_POLL_S = 0.5
_FAILED = 4
"""Exit code of `logs --follow` for a run that did not succeed, as for a job of the job API."""


def local_runs(limit: int, status: str | None = None) -> list[dict[str, Any]]:
    """
    Give the runs below `runs/`, newest first, with the fields that a job of the job API has.

    Args:
        limit: at most so many.
        status: only those; None: all.
    """
    return list(islice((run for run in _runs() if status in (None, run["status"])), limit))


def _runs() -> Iterator[dict[str, Any]]:
    """
    Give the facts of the runs below `runs/`, newest first.

    Raises:
        SpecError: `runs/` may not be read.
    """
    with naming_path(HOME):
        paths = [*HOME.iterdir()] if HOME.is_dir() else []
    started = {path: at for path in paths if (at := _mtime(path / "job.yaml")) is not None}
    for path in sorted(started, key=started.__getitem__, reverse=True):
        try:
            facts = _facts(read_run(path, steps=False), started[path])
        except DistplatError:  # another program's, or it may not be read
            continue
        yield facts


def _mtime(path: Path) -> float | None:
    """Give a file's modification time; None: it is not there, or not readable."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _facts(record: RunRecord, started: float) -> dict[str, Any]:
    job, state = record.job, status_of(record, time.time())
    strategy, scaling = job.get("strategy"), job.get("scaling")
    ended = _mtime(record.path / "result.json")
    return {
        "id": record.path.name,
        "name": job.get("name"),
        "status": state.word,
        "strategy": strategy.get("name") if isinstance(strategy, dict) else None,
        "num_workers": scaling.get("num_workers") if isinstance(scaling, dict) else None,
        "exit_code": None,
        "message": state.error or state.detail,
        "start_time": int(started * 1000),
        "end_time": None if ended is None else int(ended * 1000),
    }


def run_called(name: str) -> Path | None:
    """Give a run's directory by its path, or its name below `runs/`; None: there is none."""
    try:
        path = find_run(Path(name))
    except SpecError:
        return None
    with naming_path(path):
        return path if (path / "job.yaml").is_file() or (path / "logs").is_dir() else None


def ended_run(name: str) -> dict[str, Any] | None:
    """Give the facts of a run that has ended, by its directory or its name; None: no such run."""
    path = run_called(name)
    if path is None:
        return None
    record = read_run(path, steps=False)
    return None if record.result is None else _facts(record, _mtime(path / "job.yaml") or 0.0)


def last_run_ended(job: str) -> dict[str, Any] | None:
    """Give the facts of a job's newest run below `runs/`, if it has ended; else None."""
    newest = next((run for run in _runs() if run["name"] == job), None)
    return None if newest is None or newest["end_time"] is None else newest


def last_run(job: str) -> Path | None:
    """
    Give the directory of a job's newest run below `runs/`.

    It comes before a folder of that name here: many a project has one for each job.

    Args:
        job: its name, as a command got it.

    Returns:
        None: there is none, or it is a path, or a run itself has that name.
    """
    try:
        if Path(job).name != job or (HOME / job).is_dir():
            return None
        return next((HOME / one["id"] for one in _runs() if one["name"] == job), None)
    except (SpecError, OSError):  # `runs/` may not be read
        return None


def print_logs(path: Path, write: Callable[[str], None], *, follow: bool) -> int:
    """
    Print what the roles of a run have printed, each line after its role's name.

    Args:
        path: of the run directory.
        write: is given each line.
        follow: until the run has ended.

    Returns:
        0; of a run that was followed and did not succeed, 4.
    """
    reader = _LogTail(path / "logs")
    while True:
        record = read_run(path, steps=False) if follow else None
        for line in reader.fresh():
            write(line)
        if record is None:
            return 0
        state = status_of(record, time.time()).word
        if state != "RUNNING":
            return 0 if state == "SUCCEEDED" else _FAILED
        time.sleep(_POLL_S)


class _LogTail:
    """
    Reads the files of a folder as they grow.

    Args:
        folder: of `<role>.log`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}  #: bytes that were given out

    def fresh(self) -> Iterator[str]:
        """
        Give whole lines that have come since.

        Raises:
            StorageError: one of the files may not be read, or is a pipe or a device.
        """
        for path in sorted(self._folder.glob("*.log")):
            with open_regular(path) as file:
                if file is None:
                    continue
                offset = self._read.get(path, 0)
                if os.fstat(file.fileno()).st_size < offset:
                    offset = 0  # it became `.log.1`, and another began
                file.seek(offset)
                while line := file.readline(MAX_LINE_BYTES):
                    if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                        break  # it is being written
                    offset += len(line)
                    self._read[path] = offset
                    for text in line.decode(errors="replace").splitlines():
                        yield f"({path.stem}) {text}"
