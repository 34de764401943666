"""
Jobs of a cluster's job API: find a job, follow its log until it ends, stop it.

Following a job polls its status and log: Ray's log stream may end before the job does (ray
issue 51601).
"""

import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from distplat.cli.address import Info, NoSuchJob
from distplat.cli.render import Facts, read_facts
from distplat.platform.errors import (
    ClusterUnreachable,
    DeadlineExceeded,
    Problem,
    SpecError,
    nearest,
    printable,
)

if TYPE_CHECKING:
    from distplat.cli.cluster import Jobs

Result = TypeVar("Result")

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STATUSES = ("PENDING", "RUNNING", *ENDED)
RESULT_MARK = "distplat-result: "
"""Prefix of the line in a job's log that contains its result as JSON."""

_POLL_S = 0.15
_LOG_BYTES_PER_S = 4e6
_PENDING_NOTE_S = 10.0
_NO_ENVIRONMENT = "RUNTIME_ENV_SETUP_FAILURE"
"""Ray's error type for a job whose runtime environment cannot be set up."""
_MESSAGE_LINES = 40
"""Number of lines printed from the end of a cluster's error message, often a traceback."""
_RETRY_S = 30.0
_STOP_TIMEOUT_S = 30.0
_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


def check_id(job_id: str) -> str:
    """
    Validate a job id, which becomes part of a URL.

    Raises:
        SpecError: the id has other characters than letters, digits, `.`, `_` and `-`.
    """
    if not _ID.fullmatch(job_id):
        raise SpecError(Problem(("id",), f"{job_id[:60]!r} is no job id", "letters, digits, . _ -"))
    return job_id


def find(jobs: "Jobs", job_id: str) -> Info:
    """
    Return a job by its id.

    Raises:
        SpecError: no job has this id; the error names the most similar or the latest ids.
    """
    try:
        return jobs.info(check_id(job_id))
    except NoSuchJob:
        pass
    ids = [job["submission_id"] for job in jobs.list()]
    closest = nearest(job_id, ids)
    recent = f"latest: {', '.join(ids[:3])}" if ids else "no job was submitted there yet"
    hint = f"did you mean {closest!r}? {recent}" if closest else recent
    raise SpecError(Problem((), f"no job {job_id!r} at {jobs.address}", hint))


def follow(jobs: "Jobs", job_id: str, write: Callable[[str], None]) -> Info:
    """
    Print a job's log as it grows, until the job has ended.

    Args:
        jobs: job API of the cluster.
        job_id: id of the job.
        write: called with each line, without control characters and line end.

    Returns:
        The details of the finished job.

    Raises:
        ClusterUnreachable: the cluster did not answer for longer than a transient network error.
    """
    printed = 0
    started = time.monotonic()
    has_pending_note = False
    while True:
        # Read the status before the log: the log of an ended job is then complete.
        info = _retry(lambda: jobs.info(job_id))
        ended = info["status"] in ENDED
        if info["status"] == "PENDING":
            if not has_pending_note and time.monotonic() - started > _PENDING_NOTE_S:
                has_pending_note = True
                write("still waiting for the cluster to start the driver")
            time.sleep(_POLL_S)
            continue
        text = _retry(lambda: jobs.logs(job_id))
        stop = len(text) if ended else text.rfind("\n") + 1
        for line in clean_lines(text[printed:stop]):
            write(line)
        printed = max(printed, stop)
        if ended:
            for line in _why_without_driver(info):
                write(line)
            return info
        time.sleep(_POLL_S + len(text) / _LOG_BYTES_PER_S)


def _retry(call: Callable[[], Result]) -> Result:
    """
    Repeat a call while the cluster cannot be reached: the job continues meanwhile.

    Raises:
        ClusterUnreachable: the cluster cannot be reached before the deadline.
    """
    deadline = time.monotonic() + _RETRY_S
    while True:
        try:
            return call()
        except ClusterUnreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S * 5)


def clean_lines(text: str) -> list[str]:
    """Split a log into lines, without control characters and ANSI codes."""
    lines = text.replace("\r\n", "\n").split("\n")
    return [printable(line) for line in (lines if lines[-1] else lines[:-1])]


class LogReader:
    """Forwards the lines of a job's log, except the result of its driver, which is parsed."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.facts: Facts | None = None

    def __call__(self, line: str) -> None:
        """Process one line."""
        if line.startswith(RESULT_MARK):
            facts = read_facts(line.removeprefix(RESULT_MARK))
            if facts is not None:  # otherwise the user's task printed the line
                self.facts = facts
                return
        if not line.startswith("Running entrypoint for job "):
            self._write(line)


def stop(
    jobs: "Jobs",
    job_id: str,
    *,
    wait: bool,
    call_controller: Callable[[Info], bool] = lambda info: False,
) -> str:
    """
    Stop a job, unless it has ended.

    Ray kills a driver 3 s after SIGTERM, which may be too soon to complete a checkpoint. So the
    run's controller is called first.

    Args:
        jobs: job API of the cluster.
        job_id: id of the job.
        wait: wait until the job has ended.
        call_controller: stops a running job through its controller; returns whether it succeeded.

    Returns:
        The status of the job.

    Raises:
        DeadlineExceeded: the job does not end.
    """
    info = find(jobs, job_id)
    status = str(info["status"])
    if status in ENDED:
        return status
    if status != "RUNNING" or not call_controller(info):
        jobs.stop(job_id)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while wait and status not in ENDED:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"stopping {job_id}", (job_id,), _STOP_TIMEOUT_S, "--no-wait")
        time.sleep(_POLL_S)
        status = str(jobs.info(job_id)["status"])
    return status


def _why_without_driver(info: Info) -> list[str]:
    """Return the cluster's message for a job whose driver did not start and has no log."""
    if info["status"] != "FAILED" or info.get("driver_exit_code") is not None:
        return []
    return clean_lines(str(info.get("message") or ""))[-_MESSAGE_LINES:]


def exit_code(info: Info) -> int:
    """Return the exit code of `submit` for a finished job: that of the driver, if it started."""
    if info["status"] == "SUCCEEDED":
        return 0
    if info.get("error_type") == _NO_ENVIRONMENT:
        return SpecError.exit_code
    code = info.get("driver_exit_code")
    return code if info["status"] == "FAILED" and code and code > 0 else 4


class Detached(KeyboardInterrupt):
    """The user stopped following a job, which continues."""


def say(line: str) -> None:
    """Write a line to stderr and flush; a closed stderr is ignored."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)
