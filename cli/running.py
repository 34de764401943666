"""`distplat scale`, `stop`, and the roles in `status`: calls of a run's actors through Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distplat.cli.address import LOOPBACK, Target, enable_token, host_and_port, target_of
from distplat.cli.common_options import Output, RunAddress, is_json
from distplat.cli.render import table_lines
from distplat.platform.errors import (
    ClusterUnreachable,
    DistplatError,
    InfrastructureError,
    Problem,
    SpecError,
    printable,
)
from distplat.platform.progress import UNBOUNDED, to_json

if TYPE_CHECKING:
    from distplat.actors.overview import Overview, RunName
    from distplat.actors.servers.scheduler import SchedulerStatus, WorkerRow
    from distplat.platform.scaling import ScaleStatus
    from distplat.platform.server_group import ServerGroupStatus, ShardAssignment


def role_lines(overview: Overview) -> list[str]:
    """Return a text with a run's roles, as lines."""
    lines = [f"run {overview.run}"]
    if overview.servers is not None:
        lines += ["", *_server_lines(overview.servers)]
    if overview.scheduler is not None:
        lines += ["", *_worker_lines(overview.scheduler, overview.scale)]
    if overview.servers is None and overview.scheduler is None:
        lines += ["its strategy has neither servers nor a task scheduler"]
    return lines


def role_facts(overview: Overview) -> dict[str, Any]:
    """Return a run's roles as JSON values."""
    scheduler = overview.scheduler
    return {
        "run": overview.run,
        "servers": None if overview.servers is None else asdict(overview.servers),
        "scheduler": None if scheduler is None else asdict(scheduler) | asdict(overview.scale),
    }


def _server_lines(servers: ServerGroupStatus) -> list[str]:
    lines = _shard_lines(servers) if servers.assignments else ["server manager    no shards"]
    if servers.tables:
        rows = [
            [str(assignment.shard), assignment.primary, _backup(assignment)]
            for assignment in servers.tables
        ]
        lines += ["embedding tables", *table_lines(["PART", "SERVER", "BACKUP"], rows)]
    return lines


def _shard_lines(servers: ServerGroupStatus) -> list[str]:
    if not servers.version:
        return ["server manager    no shards yet: no worker has registered"]
    total = servers.cuts[-1].stop if servers.cuts else 0
    head = f"server manager    map version {servers.version}, {total:,} elements"
    columns = ["SHARD", "ELEMENTS", "SERVER", "BACKUP"]
    rows = []
    for cut, assignment in zip(servers.cuts, servers.assignments, strict=True):
        elements = f"{cut.start:,}..{cut.stop:,}"
        rows.append([str(cut.index), elements, assignment.primary, _backup(assignment)])
    if not servers.replicated:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return [head, *table_lines(columns, rows)]


def _backup(assignment: ShardAssignment) -> str:
    if assignment.backup is not None:
        return assignment.backup if assignment.ready else f"{assignment.backup} (being filled)"
    return f"{assignment.starting} (starting)" if assignment.starting is not None else "-"


def _worker_lines(scheduler: SchedulerStatus, scale: ScaleStatus) -> list[str]:
    if not scheduler.steps:
        return ["task scheduler    no worker has registered yet"]
    of = f" of {scheduler.steps}" if scheduler.steps < UNBOUNDED else ""
    head = f"task scheduler    step {scheduler.done}{of}, attempt {scheduler.attempt}"
    if scheduler.dynamic_tasks:
        duplicates = f"{scheduler.duplicates} were computed twice"
        head += f", tasks of 1/{scheduler.parts} step are leased, {duplicates}"
    else:
        head += ", each worker computes its part of every step"
    unit = "TASKS" if scheduler.dynamic_tasks else "STEPS"
    columns = ["WORKER", "STEP", unit, f"{unit}/S", "WORK", "LEASE", ""]
    lines = [head, *table_lines(columns, [_row(entry, scheduler) for entry in scheduler.workers])]
    if scale.refused and scale.request is not None:
        lines.append(f"{scale.request.workers} workers were refused: {scale.refused}")
    elif scale.request is not None and scale.request.workers != len(scheduler.workers):
        lines.append(f"{scale.request.workers} workers were asked for")
    return lines


def _row(entry: WorkerRow, scheduler: SchedulerStatus) -> list[str]:
    stats = entry.stats
    lease = f"part {stats.rank} of {scheduler.parts}"
    if scheduler.dynamic_tasks:
        lease = "-"
        if entry.lease is not None:
            first, last, count = entry.lease
            lease = f"{first}" if count == 1 else f"{first}..{last} ({count})"
    flags = [("straggler", stats.straggler), ("leaving", entry.leaving)]
    flags += [(f"silent for {stats.silent_s:.0f} s", stats.silent_s >= _SILENT_S)]
    return [
        f"worker-{stats.rank}",
        str(stats.step),
        str(stats.made),
        "-" if stats.per_s is None else f"{stats.per_s:.1f}",
        "-" if stats.step_s is None else f"{stats.step_s * 1e3:.1f} ms",
        lease,
        ", ".join(word for word, marked in flags if marked),
    ]


_SILENT_S = 3.0


def scale(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Name of the job, or of its run.")],
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="New number of workers.")],
    address: RunAddress = None,
    wait_s: Annotated[
        float,
        typer.Option("--wait-s", min=0, help="Deadline for the change in seconds; 0: do not wait."),
    ] = 120.0,
    output: Output = "text",
) -> None:
    """
    Add workers to a `ps-async` or `ps-sync` run, or remove workers from it.

    No other worker is restarted. Under `ps-async` the other workers are not interrupted; under
    `ps-sync` the run changes between two steps, once new workers are ready. Call this command on a
    machine of the cluster.
    """
    as_json = is_json(output)
    with joined(address, job) as run:
        from distplat.actors.overview import scale as change

        overview = change(run, workers, wait_s)
    if as_json:
        print(to_json(role_facts(overview)))
    else:
        print(printable("\n".join(role_lines(overview))))


def roles_of(address: str | None, name: str) -> Overview:
    """
    Return the status of a run's roles.

    Args:
        address: see `joined`.
        name: name of the job or of the run.

    Raises:
        SpecError: there is no such run, or several; or the address has the wrong type.
        InfrastructureError: the cluster or a role does not answer.
    """
    with joined(address, name) as run:
        from distplat.actors.overview import overview

        return overview(run)


def stop_run(address: str | None, name: str, submission: str | None, wait_s: float) -> str:
    """
    Stop a run by a call of its controller.

    Args:
        address: see `joined`.
        name: name of the job or of the run.
        submission: submission id at the job API; None: not submitted through a job API.
        wait_s: deadline for the end of the run.

    Returns:
        The status of the run; see `overview.stop`.

    Raises:
        SpecError: there is no such run, or several; or the address has the wrong type.
        InfrastructureError, ClusterUnreachable: the cluster or the controller does not answer.
    """
    with joined(address, name, submission) as run:
        from distplat.actors.overview import stop

        return stop(run, wait_s)


@contextmanager
def joined(address: str | None, name: str, submission: str | None = None) -> Iterator[RunName]:
    """
    Connect to the Ray cluster of a run; this machine must be a node of the cluster.

    Args:
        address: `--address`; the URL of a job API stands for its cluster on this machine.
        name: name of the job or of the run.
        submission: submission id at the job API; None: not submitted through a job API.

    Yields:
        The run.

    Raises:
        SpecError: there is no such run, or several; or the address cannot be joined from here.
        ClusterUnreachable: no Ray runs at the address.
    """
    target = _target_to_join(address)
    enable_token(target)
    with redirect_stdout(sys.stderr), _connection(target, name, submission):
        from distplat.actors.overview import one_run, submitted_run

        yield one_run(name) if submission is None else submitted_run(submission, name)


def _target_to_join(address: str | None) -> Target:
    """
    Return the target of an address.

    Raises:
        SpecError: the address cannot be joined from this machine.
    """
    target = target_of(address, os.environ)
    if target.origin and target.kind == "local":
        text = "a local Ray belongs to the run that started it"
        raise SpecError(Problem((target.origin,), text, "leave --address out, or give HOST:6379"))
    if target.kind == "jobs" and host_and_port(target.address)[0] not in LOOPBACK:
        text = f"{target.address} is a job API, and this needs a machine of the cluster"
        raise SpecError(Problem((target.origin,), text, "call it there, without --address"))
    return target


def _connection(target: Target, name: str, submission: str | None) -> AbstractContextManager[None]:
    """Return a connection to the target, or to the Ray instance on this machine with the run."""
    from distplat.cli.join import connected_here, connected_to, rays_here

    if target.kind == "driver" and target.address != "auto":
        return connected_to(target.address)
    # The URL of a job API names one cluster: other instances are not searched.
    rays = [] if target.kind == "jobs" else rays_here()
    if len(rays) < 2:
        return connected_here()
    return connected_to(_address_of_run(rays, name, submission), own=True)


def _address_of_run(rays: Sequence[str], name: str, submission: str | None) -> str:
    """
    Search several Ray instances on this machine for a run, and return the address of its instance.

    Raises:
        SpecError: no instance, or more than one, has a run of that name.
        ClusterUnreachable: no instance answers.
    """
    from distplat.actors.overview import NoSuchRun, find_runs, submitted_run
    from distplat.cli.join import connected_to

    matches: list[tuple[str, str]] = []
    not_found: list[Problem] = []
    unreachable: list[DistplatError] = []
    for address in rays:
        try:
            with connected_to(address, own=True):
                runs = find_runs(name) if submission is None else [submitted_run(submission, name)]
            matches += [(address, run_name.run) for run_name in runs]
        except SpecError as error:
            for problem in error.problems:
                not_found.append(replace(problem, message=f"{problem.message} at {address}"))
        except (ClusterUnreachable, InfrastructureError) as error:  # e.g. the instance is stopping
            unreachable.append(error)
    if not matches and not not_found and unreachable:
        raise unreachable[0]
    if not matches and not unreachable:
        raise NoSuchRun(*not_found)
    if not matches:
        raise SpecError(*not_found, *(Problem((), str(error)) for error in unreachable))
    if len({address for address, _ in matches}) > 1:
        listed = ", ".join(f"{run} at {address}" for address, run in matches)
        text = f"several runs of job {name!r} are active"
        raise SpecError(Problem((), text, f"name one: {listed}"))
    return matches[0][0]
