"""
A job on a cluster's job API: hand it in, follow it to its end, look after it later.

Following asks for status and log again and again: Ray's own log stream has been seen to stop
before the job does (ray issue 51601), and what is asked again cannot stop.
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

Answer = TypeVar("Answer")

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STATUSES = ("PENDING", "RUNNING", *ENDED)
RESULT_MARK = "distplat-result: "
"""Begins the line of a job's log that holds its result as JSON."""

_POLL_S = 0.15
_LOG_BYTES_PER_S = 4e6
_PENDING_NOTE_S = 10.0
_NO_ENVIRONMENT = "RUNTIME_ENV_SETUP_FAILURE"
"""Ray's word for a job whose runtime environment cannot be set up."""
_MESSAGE_LINES = 40
"""Of a message of the cluster's: what has failed stands at the end of a traceback."""
_PATIENCE_S = 30.0
_STOP_TIMEOUT_S = 30.0
_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


def check_id(job_id: str) -> str:
    """
    Let through what can be a job's id: it becomes part of a URL.

    Raises:
        SpecError: it cannot.
    """
    if not _ID.fullmatch(job_id):
        raise SpecError(Problem(("id",), f"{job_id[:60]!r} is no job id", "letters, digits, . _ -"))
    return job_id


def find(jobs: "Jobs", job_id: str) -> Info:
    """
    Look a job up.

    Raises:
        SpecError: there is none of that id; names the nearest, or the latest.
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
    Write a job's log as it grows; return when the job has ended.

    Args:
        jobs: where it runs.
        job_id: which one.
        write: takes whole lines, without control characters, without their ends.

    Raises:
        ClusterUnreachable: the cluster was gone for longer than a passing trouble of the net.
    """
    printed = 0
    began = time.monotonic()
    said_pending = False
    while True:
        # Before the log: what was logged before the end is then seen.
        info = _retry(lambda: jobs.info(job_id))
        ended = info["status"] in ENDED
        if info["status"] == "PENDING":
            if not said_pending and time.monotonic() - began > _PENDING_NOTE_S:
                said_pending = True
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


def _retry(call: Callable[[], Answer]) -> Answer:
    """
    Ask again while the cluster cannot be reached: the job goes on without us.

    Raises:
        ClusterUnreachable: still not, after a while.
    """
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return call()
        except ClusterUnreachable:
            if time.monotonic() > give_up:
                raise
            time.sleep(_POLL_S * 5)


def clean_lines(text: str) -> list[str]:
    """Cut a log into lines, without what would move the reader's cursor or colour the terminal."""
    lines = text.replace("\r\n", "\n").split("\n")
    return [printable(line) for line in (lines if lines[-1] else lines[:-1])]


class LogReader:
    """Passes a job's log on and keeps the result that its driver wrote into it."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.facts: Facts | None = None

    def __call__(self, line: str) -> None:
        """Take one line."""
        if line.startswith(RESULT_MARK):
            facts = read_facts(line.removeprefix(RESULT_MARK))
            if facts is not None:  # the user's task may print what it likes
                self.facts = facts
                return
        if not line.startswith("Running entrypoint for job "):
            self._write(line)


def stop(
    jobs: "Jobs", job_id: str, *, wait: bool, call: Callable[[Info], bool] = lambda info: False
) -> str:
    """
    End a job; one that has ended is left alone.

    Ray kills a driver that has not ended 3 s after it was asked to: too soon for a checkpoint that
    is being written. So the run's controller is asked first.

    Args:
        jobs: where it runs.
        job_id: which one.
        wait: until it has ended.
        call: asks the controller of a job that is running; says whether it could be asked.

    Returns:
        Its status.

    Raises:
        DeadlineExceeded: it does not end.
    """
    info = find(jobs, job_id)
    status = str(info["status"])
    if status in ENDED:
        return status
    if status != "RUNNING" or not call(info):
        jobs.stop(job_id)
    give_up = time.monotonic() + _STOP_TIMEOUT_S
    while wait and status not in ENDED:
        if time.monotonic() > give_up:
            raise DeadlineExceeded(f"stopping {job_id}", (job_id,), _STOP_TIMEOUT_S, "--no-wait")
        time.sleep(_POLL_S)
        status = str(jobs.info(job_id)["status"])
    return status


def _why_without_driver(info: Info) -> list[str]:
    """Give what the cluster says of a job whose driver did not start, and so has logged nothing."""
    if info["status"] != "FAILED" or info.get("driver_exit_code") is not None:
        return []
    return clean_lines(str(info.get("message") or ""))[-_MESSAGE_LINES:]


def exit_code(info: Info) -> int:
    """Give the exit code of `submit` for an ended job: the driver's own, where there is one."""
    if info["status"] == "SUCCEEDED":
        return 0
    if info.get("error_type") == _NO_ENVIRONMENT:
        return SpecError.exit_code
    code = info.get("driver_exit_code")
    return code if info["status"] == "FAILED" and code and code > 0 else 4


class Detached(KeyboardInterrupt):
    """The user stopped following a job, which goes on."""


def say(line: str) -> None:
    """Write a line to stderr and flush; a closed stderr is ignored."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)
