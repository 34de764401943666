"""`distplat list`, `status`, `logs` and `stop`: looking after jobs that a cluster has."""

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
from distplat.cli.run_folders import ended_run, last_run, last_run_ended, local_runs, run_called
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
"""Grows when a field of the JSON output changes its meaning or goes."""
DASHBOARD = "http://127.0.0.1:8265"
"""Where Ray's job API is on the machine of the head, if nobody said otherwise."""

_STOP_S = 70.0
"""How long a run may take to end: as its driver allows it, and a little."""

_WRITTEN_S, _RETRY_S = 3.0, 0.2
"""How long to look for the result of a run that is over, and how often."""

_COLUMNS = {
    **{name: name for name in ("id", "name", "status", "strategy")},
    **{"workers": "num_workers", "age": "start_time"},
}
"""Columns of the table: name, and the field that it shows."""


def open_jobs(address: str | None) -> "Jobs":
    """
    Connect to the job API at an address, or to the one of this machine.

    Raises:
        SpecError: the address is none of a job API.
        ClusterUnreachable: nobody answers there.
    """
    target = target_of(address, os.environ)
    if target.kind != "jobs" and target.origin:
        message = f"{target.address} is no job API, and a job has to be looked for in one"
        raise SpecError(Problem((target.origin,), message, "give http://HOST:8265"))
    from distplat.cli.cluster import Jobs

    return Jobs(target.address if target.origin else DASHBOARD)


def list_jobs(
    address: JobApi = None,
    status: Annotated[
        str | None, typer.Option(help="PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    every: Annotated[bool, typer.Option("--all", help="Other programs' jobs too.")] = False,
    output: Output = "text",
) -> None:
    """List the jobs of a cluster, and the runs below `runs/`, newest first."""
    as_json = is_json(output)
    wanted_status = status.upper() if status else None
    if wanted_status is not None and wanted_status not in remote.STATUSES:
        raise SpecError(
            Problem(("--status",), f"unknown {status!r}", hint(wanted_status, remote.STATUSES))
        )
    named = bool(target_of(address, os.environ).origin)
    runs = [] if named else local_runs(limit, wanted_status)
    try:
        cluster_jobs = [
            _facts(job)
            for job in open_jobs(address).list()
            if (every or VERSION_KEY in job["metadata"]) and wanted_status in (None, job["status"])
        ]
    except ClusterUnreachable:
        if not runs:
            raise
        cluster_jobs = []
    jobs = sorted([*cluster_jobs, *runs], key=lambda one: -(one["start_time"] or 0))[:limit]
    if as_json:
        print(to_json({"version": OUTPUT_VERSION, "jobs": jobs}))
        return
    rows = [[row[name] for name in _COLUMNS] for row in map(_row, jobs)]
    print_table([name.upper() for name in _COLUMNS], rows)


def status(job_id: JobId, address: RunAddress = None, output: Output = "text") -> None:
    """
    Show how a job stands, and its roles.

    Roles are shown on a machine of the cluster, while the job runs.

    ID is a submission id, or the name of a run or job that was not submitted through a job API; or
    the name or directory of a run below `runs/` that has ended, or the name of its job.
    """
    as_json = is_json(output)
    info, trouble = _find_job(address, job_id)
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
            if trouble is not None:
                raise _choose_error(address, trouble, error) from None
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
    """Print how a run stands that no job API knows, and that has ended."""
    if as_json:
        print(to_json({"version": OUTPUT_VERSION, **facts, "roles": None}))
        return
    row = _row(facts)
    pairs = [(name, row[name]) for name in _COLUMNS]
    print_pairs([*pairs, ("message", _cell(facts["message"]))] if facts["message"] else pairs)


def _find_job(address: str | None, job_id: str) -> tuple[Info, None] | tuple[None, DistplatError]:
    """Ask the job API for a job; or give why it does not have it."""
    try:
        return remote.find(open_jobs(address), job_id), None
    except (SpecError, ClusterUnreachable) as error:
        return None, error


def _last_ended_run(address: str | None, job: str, unknown: DistplatError) -> dict[str, Any] | None:
    """
    Give the facts of a job's last run here, where no Ray has one that goes on; else None.

    Args:
        address: as given.
        job: its name.
        unknown: what was said where a Ray was asked for it.
    """
    if target_of(address, os.environ).origin:
        return None
    from distplat.actors.overview import NoSuchRun
    from distplat.cli.join import rays_here

    nowhere = isinstance(unknown, ClusterUnreachable) and not rays_here()
    return last_run_ended(job) if nowhere or isinstance(unknown, NoSuchRun) else None


def _choose_error(
    address: str | None, of_jobs: DistplatError, of_ray: DistplatError
) -> DistplatError:
    """Choose the error where neither the job API nor Ray knows a run."""
    named = target_of(address, os.environ).origin
    return of_jobs if named or not isinstance(of_jobs, ClusterUnreachable) else of_ray


def _nowhere(address: str | None, name: str, of_jobs: DistplatError) -> DistplatError:
    """Say that no run here has a name, too, where nobody has named the job API that is silent."""
    if target_of(address, os.environ).origin or not isinstance(of_jobs, ClusterUnreachable):
        return of_jobs
    return ClusterUnreachable(f"no run or job {name!r} is below runs/, nor at a job API: {of_jobs}")


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
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job ends.")] = False,
) -> None:
    """
    Print a job's log.

    ID is a submission id; or the name or directory of a run below `runs/`, or the name of its job,
    of which the newest run is meant.
    """
    try:
        jobs = open_jobs(address)
        remote.find(jobs, job_id)
    except (SpecError, ClusterUnreachable) as error:
        path = None if address is not None else last_run(job_id) or run_called(job_id)
        if path is None:
            raise _nowhere(address, job_id, error) from None
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
            where = shlex.join([job_id, "--address", jobs.address])
            remote.say(f"\nstopped reading; the job goes on\n  stop it: distplat stop {where}")
            raise remote.Detached from None
    if reader.facts is not None:
        print_result(reader.facts)
    if code:
        raise typer.Exit(code)


def _print_run_logs(path: Path, *, follow: bool) -> None:
    try:
        code = run_folders.print_logs(path, lambda line: print(printable(line)), follow=follow)
    except KeyboardInterrupt:
        remote.say(f"\nstopped reading; the run goes on\n  stop it: distplat stop {path.name}")
        raise remote.Detached from None
    if code:
        raise typer.Exit(code)


def stop(
    job_id: JobId,
    address: RunAddress = None,
    wait: Annotated[bool, typer.Option(help="Wait until it has ended.")] = True,
) -> None:
    """
    End a job in order, as Ctrl-C does: after the step under way, with a checkpoint of it.

    One that has ended is left alone. On a machine of the cluster the run's controller is called,
    and has the time that it needs. Elsewhere, and before the run has begun, Ray's job API ends the
    driver, with SIGTERM and 3 s later SIGKILL.

    ID is a submission id, or the name of a run or job that was not submitted through a job API,
    also of one below `runs/` that has ended.
    """
    wait_s, before = _STOP_S if wait else 0.0, ""
    try:
        jobs = open_jobs(address)
        before = remote.find(jobs, job_id)["status"]
    except (SpecError, ClusterUnreachable) as error:
        ended = ended_run(job_id) if address is None else None
        if ended is not None:
            before = now = ended["status"]
        else:
            before, now = _stop_unsubmitted(address, job_id, wait_s, error)
    else:
        call = partial(_stop_submitted, address, job_id, wait_s)
        now = remote.stop(jobs, job_id, wait=wait, call=call)
    already = "already " if before in remote.ENDED else ""
    asked = "asked to stop, now " if now not in (*remote.ENDED, "over") else ""
    print(printable(f"{job_id}: {already}{asked}{now}"))


def _stop_submitted(address: str | None, job_id: str, wait_s: float, info: Info) -> bool:
    """Ask the controller of a job that the job API knows; False: it is not to be reached here."""
    metadata = info["metadata"]
    if VERSION_KEY not in metadata:
        return False
    try:
        status = stop_run(address, metadata["job_name"], job_id, wait_s)
    except DistplatError:  # no machine of the cluster, the run has not begun, or it hangs
        return False
    return not wait_s or status in remote.ENDED


def _stop_unsubmitted(
    address: str | None, name: str, wait_s: float, unknown: DistplatError
) -> tuple[str, str]:
    """
    Stop a run that no job API knows; give its status before, if it had ended, and now.

    Args:
        address: where.
        name: of the job, or of the run.
        wait_s: how long to wait for its end; 0: not at all.
        unknown: what the job API said.

    Raises:
        DistplatError: `unknown`, where Ray knows it neither.
        DeadlineExceeded: it does not end.
    """
    try:
        status = stop_run(address, name, None, wait_s)
    except ActorLost:  # it was over before it could say how
        return "", _over(name)
    except (SpecError, ClusterUnreachable) as error:
        if (ended := _last_ended_run(address, name, error)) is not None:
            return ended["status"], ended["status"]
        raise _choose_error(address, unknown, error) from None
    if wait_s and status not in remote.ENDED:
        raise DeadlineExceeded(f"stopping {name}", (name,), wait_s, "--no-wait")
    return "", status


def _over(name: str) -> str:
    """
    Say how a run ended whose controller is gone; `over`, where its directory is not known here.

    The driver writes that down once the actors are ended.
    """
    until = time.monotonic() + _WRITTEN_S
    while time.monotonic() < until:
        if (ended := ended_run(name)) is not None:
            return str(ended["status"])
        time.sleep(_RETRY_S)
    return "over"


def _facts(job: Info) -> dict[str, Any]:
    """Give the fields of the JSON output."""
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
    """Give the cells of the table, without control characters."""
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
