"""`distplat list`, `status`, `logs` and `stop`: manage the jobs of a cluster and local runs."""

import os
import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distplat.cli import remote, run_folders
from distplat.cli.address import VERSION_KEY, Info, target_of
from distplat.cli.common_options import JobApi, JobId, Output, RunAddress, is_json
from distplat.cli.render import print_pairs, print_result, print_table
from distplat.cli.run_folders import (
    ended_run,
    find_run_directory,
    last_run,
    last_run_ended,
    local_runs,
)
from distplat.cli.running import role_facts, role_lines, roles_of, stop_run
from distplat.platform.errors import (
    ActorLost,
    ClusterUnreachable,
    DeadlineExceeded,
    DistplatError,
    Problem,
    SpecError,
    hint,
    printable,
)
from distplat.platform.progress import to_json

if TYPE_CHECKING:
    from distplat.actors.overview import Overview
    from distplat.cli.cluster import Jobs

OUTPUT_VERSION = 2
"""Incremented when a field of the JSON output changes its meaning or is removed."""
DASHBOARD = "http://127.0.0.1:8265"
"""Ray's default job API address on the head's machine."""

_STOP_S = 70.0
"""Deadline for stopping a run: slightly longer than the deadline of its driver."""

_RESULT_S, _RETRY_S = 3.0, 0.2
"""Deadline and interval of the search for the result of a finished run."""

_COLUMNS = {
    **{name: name for name in ("id", "name", "status", "strategy")},
    **{"workers": "num_workers", "age": "start_time"},
}
"""Columns of the table: name, and the JSON field."""


def open_jobs(address: str | None) -> "Jobs":
    """
    Connect to the job API at an address; default: the job API on this machine.

    Raises:
        SpecError: the address is not that of a job API.
        ClusterUnreachable: no job API answers there.
    """
    target = target_of(address, os.environ)
    if target.kind != "jobs" and target.origin:
        message = f"{target.address} is not a job API, which is needed to find a job"
        raise SpecError(Problem((target.origin,), message, "give http://HOST:8265"))
    from distplat.cli.cluster import Jobs

    return Jobs(target.address if target.origin else DASHBOARD)


def list_jobs(
    address: JobApi = None,
    status: Annotated[
        str | None, typer.Option(help="PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of jobs.")] = 20,
    all_jobs: Annotated[
        bool, typer.Option("--all", help="Include jobs of other programs.")
    ] = False,
    output: Output = "text",
) -> None:
    """List the jobs of a cluster, and the runs below `runs/`, newest first."""
    as_json = is_json(output)
    wanted_status = status.upper() if status else None
    if wanted_status is not None and wanted_status not in remote.STATUSES:
        raise SpecError(
            Problem(("--status",), f"unknown {status!r}", hint(wanted_status, remote.STATUSES))
        )
    has_address = bool(target_of(address, os.environ).origin)
    runs = [] if has_address else local_runs(limit, wanted_status)
    try:
        cluster_jobs = [
            _facts(job)
            for job in open_jobs(address).list()
            if (all_jobs or VERSION_KEY in job["metadata"])
            and wanted_status in (None, job["status"])
        ]
    except ClusterUnreachable:
        if not runs:
            raise
        cluster_jobs = []
    jobs = sorted([*cluster_jobs, *runs], key=lambda job: -(job["start_time"] or 0))[:limit]
    if as_json:
        print(to_json({"version": OUTPUT_VERSION, "jobs": jobs}))
        return
    rows = [[row[name] for name in _COLUMNS] for row in map(_row, jobs)]
    print_table([name.upper() for name in _COLUMNS], rows)


def status(job_id: JobId, address: RunAddress = None, output: Output = "text") -> None:
    """
    Show the status of a job, and its roles.

    Roles are shown only on a machine of the cluster, and only while the job runs.

    ID is a submission id, or the name of a run or job that was not submitted through a job API; or
    the name or directory of a finished run below `runs/`, or the name of its job.
    """
    as_json = is_json(output)
    info, lookup_error = _find_job(address, job_id)
    overview: Overview | None = None
    roles_error = ""
    if info is None or info["status"] == "RUNNING":
        try:
            name = job_id if info is None else info["metadata"].get("job_name", job_id)
            overview = roles_of(address, name)
        except DistplatError as error:
            ended = ended_run(job_id) if address is None else None
            ended = ended or _last_ended_run(address, job_id, error)
            if ended is not None:
                _print_ended(ended, as_json=as_json)
                return
            if lookup_error is not None:
                raise _choose_error(address, lookup_error, error) from None
            roles_error = " ".join(str(error).split())
    if as_json:
        facts = {} if info is None else _facts(info)
        roles = None if overview is None else role_facts(overview)
        print(to_json({"version": OUTPUT_VERSION, **facts, "roles": roles}))
        return
    if info is not None:
        print_pairs(_pairs(info))
    if roles_error:
        remote.say(f"its roles are not shown: {roles_error}")
    if overview is not None:
        lines = role_lines(overview) if info is None else ["", *role_lines(overview)]
        print(printable("\n".join(lines)))


def _print_ended(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the status of a finished run that was not submitted through a job API."""
    if as_json:
        print(to_json({"version": OUTPUT_VERSION, **facts, "roles": None}))
        return
    row = _row(facts)
    pairs = [(name, row[name]) for name in _COLUMNS]
    print_pairs([*pairs, ("message", _cell(facts["message"]))] if facts["message"] else pairs)


def _find_job(address: str | None, job_id: str) -> tuple[Info, None] | tuple[None, DistplatError]:
    """Return the job from the job API, or the error of the lookup."""
    try:
        return remote.find(open_jobs(address), job_id), None
    except (SpecError, ClusterUnreachable) as error:
        return None, error


def _last_ended_run(
    address: str | None, job: str, ray_error: DistplatError
) -> dict[str, Any] | None:
    """
    Return the facts of a job's last local run, if no Ray on this machine runs the job; else None.

    Args:
        address: `--address`.
        job: name of the job.
        ray_error: error of the search for the job through Ray.
    """
    if target_of(address, os.environ).origin:
        return None
    from distplat.actors.overview import NoSuchRun
    from distplat.cli.join import rays_here

    no_ray = isinstance(ray_error, ClusterUnreachable) and not rays_here()
    return last_run_ended(job) if no_ray or isinstance(ray_error, NoSuchRun) else None


def _choose_error(
    address: str | None, jobs_error: DistplatError, ray_error: DistplatError
) -> DistplatError:
    """Return the error to report if neither the job API nor Ray has a run."""
    has_address = target_of(address, os.environ).origin
    use_jobs_error = has_address or not isinstance(jobs_error, ClusterUnreachable)
    return jobs_error if use_jobs_error else ray_error


def _not_found_error(address: str | None, name: str, jobs_error: DistplatError) -> DistplatError:
    """Return the error for a missing job; without an address it mentions local runs as well."""
    if target_of(address, os.environ).origin or not isinstance(jobs_error, ClusterUnreachable):
        return jobs_error
    text = f"no run or job {name!r} is below runs/, nor at a job API: {jobs_error}"
    return ClusterUnreachable(text)


def _pairs(info: Info) -> list[tuple[str, str]]:
    row = _row(_facts(info))
    code = info["driver_exit_code"]
    pairs = [(name, row[name]) for name in _COLUMNS]
    if code is not None:
        pairs.append(("exit code", str(code)))
    if info["status"] not in ("SUCCEEDED", "RUNNING") and info["message"]:
        pairs.append(("message", remote.clean_lines(info["message"])[0]))
    return pairs


def logs(
    job_id: JobId,
    address: JobApi = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Follow the log until the job ends.")
    ] = False,
) -> None:
    """
    Print a job's log.

    ID is a submission id; or the name or directory of a run below `runs/`; or the name of a job,
    which selects its newest run.
    """
    try:
        jobs = open_jobs(address)
        remote.find(jobs, job_id)
    except (SpecError, ClusterUnreachable) as error:
        path = None if address is not None else last_run(job_id) or find_run_directory(job_id)
        if path is None:
            raise _not_found_error(address, job_id, error) from None
        _print_run_logs(path, follow=follow)
        return
    reader = remote.LogReader(lambda line: print(printable(line), flush=True))
    if not follow:
        for line in remote.clean_lines(jobs.logs(job_id)):
            reader(line)
        code = 0
    else:
        try:
            code = remote.exit_code(remote.follow(jobs, job_id, reader))
        except KeyboardInterrupt:
            arguments = shlex.join([job_id, "--address", jobs.address])
            text = f"\nstopped reading; the job continues\n  stop it: distplat stop {arguments}"
            remote.say(text)
            raise remote.Detached from None
    if reader.facts is not None:
        print_result(reader.facts)
    if code:
        raise typer.Exit(code)


def _print_run_logs(path: Path, *, follow: bool) -> None:
    try:
        code = run_folders.print_logs(path, lambda line: print(printable(line)), follow=follow)
    except KeyboardInterrupt:
        text = f"\nstopped reading; the run continues\n  stop it: distplat stop {path.name}"
        remote.say(text)
        raise remote.Detached from None
    if code:
        raise typer.Exit(code)


def stop(
    job_id: JobId,
    address: RunAddress = None,
    wait: Annotated[bool, typer.Option(help="Wait until the job has ended.")] = True,
) -> None:
    """
    Stop a job gracefully, as Ctrl-C does: after the current step, with a checkpoint of it.

    A finished job is left unchanged. On a machine of the cluster the run's controller is called, so
    that the checkpoint is completed. Elsewhere, and before the run has started, Ray's job API stops
    the driver, with SIGTERM and 3 s later SIGKILL.

    ID is a submission id, or the name of a run or job that was not submitted through a job API,
    also of a finished run below `runs/`.
    """
    wait_s, old_status = _STOP_S if wait else 0.0, ""
    try:
        jobs = open_jobs(address)
        old_status = remote.find(jobs, job_id)["status"]
    except (SpecError, ClusterUnreachable) as error:
        ended = ended_run(job_id) if address is None else None
        if ended is not None:
            old_status = new_status = ended["status"]
        else:
            old_status, new_status = _stop_unsubmitted(address, job_id, wait_s, error)
    else:
        call_controller = partial(_stop_submitted, address, job_id, wait_s)
        new_status = remote.stop(jobs, job_id, wait=wait, call_controller=call_controller)
    already = "already " if old_status in remote.ENDED else ""
    asked = "asked to stop, now " if new_status not in (*remote.ENDED, "over") else ""
    print(printable(f"{job_id}: {already}{asked}{new_status}"))


def _stop_submitted(address: str | None, job_id: str, wait_s: float, info: Info) -> bool:
    """Stop a submitted job through its controller; return False if it cannot be reached."""
    metadata = info["metadata"]
    if VERSION_KEY not in metadata:
        return False
    try:
        status = stop_run(address, metadata["job_name"], job_id, wait_s)
    except DistplatError:  # not a machine of the cluster, or the run has not started, or it hangs
        return False
    return not wait_s or status in remote.ENDED


def _stop_unsubmitted(
    address: str | None, name: str, wait_s: float, jobs_error: DistplatError
) -> tuple[str, str]:
    """
    Stop a run that was not submitted through a job API.

    Args:
        address: `--address`.
        name: name of the job or of the run.
        wait_s: deadline for the end of the run; 0: do not wait.
        jobs_error: error of the lookup at the job API.

    Returns:
        The status before, empty for a running run, and the status now.

    Raises:
        DistplatError: `jobs_error`, if Ray has no such run either.
        DeadlineExceeded: the run does not end.
    """
    try:
        status = stop_run(address, name, None, wait_s)
    except ActorLost:  # the run ended before it could report its status
        return "", _final_status(name)
    except (SpecError, ClusterUnreachable) as error:
        if (ended := _last_ended_run(address, name, error)) is not None:
            return ended["status"], ended["status"]
        raise _choose_error(address, jobs_error, error) from None
    if wait_s and status not in remote.ENDED:
        raise DeadlineExceeded(f"stopping {name}", (name,), wait_s, "--no-wait")
    return "", status


def _final_status(name: str) -> str:
    """
    Return the status of a run whose controller has ended; `over` without a local run directory.

    The driver writes the status after all actors have ended.
    """
    deadline = time.monotonic() + _RESULT_S
    while time.monotonic() < deadline:
        if (ended := ended_run(name)) is not None:
            return str(ended["status"])
        time.sleep(_RETRY_S)
    return "over"


def _facts(job: Info) -> dict[str, Any]:
    """Return the fields of a job for the JSON output."""
    metadata = job["metadata"]
    workers = metadata.get("num_workers", "")
    return {
        "id": job["submission_id"],
        "name": metadata.get("job_name"),
        "status": job["status"],
        "strategy": metadata.get("strategy"),
        "num_workers": int(workers) if workers.isdecimal() else None,
        "exit_code": job["driver_exit_code"],
        "message": job["message"],
        "start_time": job["start_time"],
        "end_time": job["end_time"],
    }


def _row(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the table cells of a job, without control characters."""
    cells = {name: facts[field] for name, field in _COLUMNS.items()}
    return {name: _cell(value) for name, value in {**cells, "age": _age(cells["age"])}.items()}


def _cell(value: object) -> str:
    text = "-" if value is None else str(value)
    return " ".join(remote.clean_lines(text))


def _age(start_ms: int | None) -> str | None:
    if start_ms is None:
        return None
    seconds = max(0, int(time.time() - start_ms / 1000))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
