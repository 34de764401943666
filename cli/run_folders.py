"""
Local runs below `runs/`, for `list`, `status` and `logs` without a job API.

After a local run of `distplat submit` or `Trainer.fit` has ended, only its directory remains. The
facts in the directory are returned with the same fields as the jobs of a job API.
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

RUNS = Path("runs")
_POLL_S = 0.5
_FAILED = 4
"""Exit code of `logs --follow` for a run that did not succeed, as for a job of the job API."""


def local_runs(limit: int, status: str | None = None) -> list[dict[str, Any]]:
    """
    Return the runs below `runs/`, newest first, with the fields that a job of the job API has.

    Args:
        limit: maximum number of runs.
        status: return only runs with this status; None: all.
    """
    return list(islice((run for run in _runs() if status in (None, run["status"])), limit))


def _runs() -> Iterator[dict[str, Any]]:
    """
    Return the facts of the runs below `runs/`, newest first.

    Raises:
        SpecError: `runs/` cannot be read.
    """
    with naming_path(RUNS):
        paths = [*RUNS.iterdir()] if RUNS.is_dir() else []
    started = {path: mtime for path in paths if (mtime := _mtime(path / "job.yaml")) is not None}
    for path in sorted(started, key=started.__getitem__, reverse=True):
        try:
            facts = _facts(read_run(path, steps=False), started[path])
        except DistplatError:  # a folder of another program, or an unreadable one
            continue
        yield facts


def _mtime(path: Path) -> float | None:
    """Return a file's modification time; None: the file does not exist or is not readable."""
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


def find_run_directory(name: str) -> Path | None:
    """Return a run's directory, by its path or its name below `runs/`; None: no such run."""
    try:
        path = find_run(Path(name))
    except SpecError:
        return None
    with naming_path(path):
        return path if (path / "job.yaml").is_file() or (path / "logs").is_dir() else None


def ended_run(name: str) -> dict[str, Any] | None:
    """Return the facts of a finished run, by its directory or its name; None: no such run."""
    path = find_run_directory(name)
    if path is None:
        return None
    record = read_run(path, steps=False)
    return None if record.result is None else _facts(record, _mtime(path / "job.yaml") or 0.0)


def last_run_ended(job: str) -> dict[str, Any] | None:
    """Return the facts of a job's newest run below `runs/`, if it has ended; else None."""
    newest = next((run for run in _runs() if run["name"] == job), None)
    return None if newest is None or newest["end_time"] is None else newest


def last_run(job: str) -> Path | None:
    """
    Return the directory of a job's newest run below `runs/`.

    The job takes precedence over a folder of the same name in the current directory, since many
    projects have one folder for each job.

    Args:
        job: argument of a command.

    Returns:
        None: the job has no run, the argument is a path, or it is the name of a run.
    """
    try:
        if Path(job).name != job or (RUNS / job).is_dir():
            return None
        return next((RUNS / run["id"] for run in _runs() if run["name"] == job), None)
    except (SpecError, OSError):  # `runs/` is not readable
        return None


def print_logs(path: Path, write: Callable[[str], None], *, follow: bool) -> int:
    """
    Print the logs of all roles of a run, each line prefixed with the role.

    Args:
        path: run directory.
        write: called with each line.
        follow: continue until the run has ended.

    Returns:
        Exit code: 0; with `follow`, 4 for a run that did not succeed.
    """
    tail = _LogTail(path / "logs")
    while True:
        record = read_run(path, steps=False) if follow else None
        for line in tail.new_lines():
            write(line)
        if record is None:
            return 0
        state = status_of(record, time.time()).word
        if state != "RUNNING":
            return 0 if state == "SUCCEEDED" else _FAILED
        time.sleep(_POLL_S)


class _LogTail:
    """
    Reads growing log files.

    Args:
        folder: folder with the files `<role>.log`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}  #: position after the last line returned

    def new_lines(self) -> Iterator[str]:
        """
        Yield the complete lines written since the last call.

        Raises:
            StorageError: a log file is not readable, or is a pipe or a device.
        """
        for path in sorted(self._folder.glob("*.log")):
            with open_regular(path) as file:
                if file is None:
                    continue
                offset = self._offsets.get(path, 0)
                if os.fstat(file.fileno()).st_size < offset:
                    offset = 0  # the log was rotated to `.log.1`
                file.seek(offset)
                while line := file.readline(MAX_LINE_BYTES):
                    if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                        break  # incomplete line
                    offset += len(line)
                    self._offsets[path] = offset
                    for text in line.decode(errors="replace").splitlines():
                        yield f"({path.stem}) {text}"
