"""`distplat scale`, `stop`, and the roles in `status`: runs are asked through Ray itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distplat.cli.address import LOOPBACK, Target, bring_token, host_and_port, target_of
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
from distplat.platform.progress import to_json

if TYPE_CHECKING:
    from distplat.actors.overview import Overview, RunName
    from distplat.actors.servers.scheduler import SchedulerStatus, WorkerRow
    from distplat.platform.scaling import ScaleStatus
    from distplat.platform.server_group import ServersSeen, ShardAssignment


def role_lines(seen: Overview) -> list[str]:
    """Give the lines of a run's roles."""
    lines = [f"run {seen.run}"]
    if seen.servers is not None:
        lines += ["", *_server_lines(seen.servers)]
    if seen.scheduler is not None:
        lines += ["", *_worker_lines(seen.scheduler, seen.scale)]
    if seen.servers is None and seen.scheduler is None:
        lines += ["its strategy has neither servers nor a task scheduler"]
    return lines


def role_facts(seen: Overview) -> dict[str, Any]:
    """Give the roles for JSON output."""
    tasks = seen.scheduler
    return {
        "run": seen.run,
        "servers": None if seen.servers is None else asdict(seen.servers),
        "scheduler": None if tasks is None else asdict(tasks) | asdict(seen.scale),
    }


def _server_lines(servers: ServersSeen) -> list[str]:
    lines = _shard_lines(servers) if servers.assignments else ["server manager    no shards"]
    if servers.tables:
        rows = [
            [str(assignment.shard), assignment.primary, _backup(assignment)]
            for assignment in servers.tables
        ]
        lines += ["embedding tables", *table_lines(["PART", "SERVER", "BACKUP"], rows)]
    return lines


def _shard_lines(servers: ServersSeen) -> list[str]:
    if not servers.version:
        return ["server manager    no shard was given out yet: no worker has come"]
    total = servers.cuts[-1].stop if servers.cuts else 0
    head = f"server manager    map version {servers.version}, {total:,} elements"
    columns = ["SHARD", "ELEMENTS", "SERVER", "BACKUP"]
    rows = []
    for cut, assignment in zip(servers.cuts, servers.assignments, strict=True):
        run = f"{cut.start:,}..{cut.stop:,}"
        rows.append([str(cut.index), run, assignment.primary, _backup(assignment)])
    if not servers.replicated:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return [head, *table_lines(columns, rows)]


def _backup(assignment: ShardAssignment) -> str:
    if assignment.backup is not None:
        return assignment.backup if assignment.ready else f"{assignment.backup} (being filled)"
    return f"{assignment.making} (starting)" if assignment.making is not None else "-"


def _worker_lines(scheduler: SchedulerStatus, scale: ScaleStatus) -> list[str]:
    if not scheduler.steps:
        return ["task scheduler    no worker has come yet"]
    head = (
        f"task scheduler    step {scheduler.done} of {scheduler.steps}, attempt {scheduler.attempt}"
    )
    if scheduler.dynamic_tasks:
        twice = f"{scheduler.duplicates} were made twice"
        head += f", tasks of 1/{scheduler.parts} step are leased, {twice}"
    else:
        head += ", each worker makes its part of every step"
    unit = "TASKS" if scheduler.dynamic_tasks else "STEPS"
    columns = ["WORKER", "STEP", unit, f"{unit}/S", "WORK", "LEASE", ""]
    lines = [head, *table_lines(columns, [_row(entry, scheduler) for entry in scheduler.workers])]
    if scale.refused and scale.request is not None:
        lines.append(f"{scale.request.workers} workers were refused: {scale.refused}")
    elif scale.request is not None and scale.request.workers != len(scheduler.workers):
        lines.append(f"{scale.request.workers} workers were asked for")
    return lines


def _row(entry: WorkerRow, scheduler: SchedulerStatus) -> list[str]:
    one = entry.stats
    lease = f"part {one.rank} of {scheduler.parts}"
    if scheduler.dynamic_tasks:
        lease = "-"
        if entry.lease is not None:
            first, last, count = entry.lease
            lease = f"{first}" if count == 1 else f"{first}..{last} ({count})"
    marks = [("straggler", one.straggler), ("leaving", entry.leaving)]
    marks += [(f"silent for {one.silent_s:.0f} s", one.silent_s >= _SILENT_S)]
    return [
        f"worker-{one.rank}",
        str(one.step),
        str(one.made),
        "-" if one.per_s is None else f"{one.per_s:.1f}",
        "-" if one.step_s is None else f"{one.step_s * 1e3:.1f} ms",
        lease,
        ", ".join(word for word, marked in marks if marked),
    ]


_SILENT_S = 3.0


def scale(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Name of the job, or of its run.")],
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="How many workers there are to be.")
    ],
    address: RunAddress = None,
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0, help="How long to wait for it; 0: not at all.")
    ] = 120.0,
    output: Output = "text",
) -> None:
    """
    Have workers join or leave a `ps-async` or `ps-sync` run.

    No other worker is restarted. Under `ps-async` nobody is disturbed; under `ps-sync` all change
    between two steps, once newcomers are ready. To be called on a machine of the cluster.
    """
    as_json = is_json(output)
    with joined(address, job) as run:
        from distplat.actors.overview import scale as change

        seen = change(run, workers, wait_s)
    if as_json:
        print(to_json(role_facts(seen)))
    else:
        print(printable("\n".join(role_lines(seen))))


def roles_of(address: str | None, name: str) -> Overview:
    """
    Ask how the roles of a run are doing.

    Args:
        address: see `joined`.
        name: of the job, or of the run.

    Raises:
        SpecError: there is no such run, or several; or the address is not for this.
        InfrastructureError: the cluster, or a role, does not answer.
    """
    with joined(address, name) as run:
        from distplat.actors.overview import overview

        return overview(run)


def stop_run(address: str | None, name: str, submission: str | None, wait_s: float) -> str:
    """
    End a run by a call of its controller.

    Args:
        address: see `joined`.
        name: of the job, or of the run.
        submission: id of its job at the job API; None: it has none.
        wait_s: how long to wait until it has ended.

    Returns:
        Its status; see `overview.stop`.

    Raises:
        SpecError: there is no such run, or several; or the address is not for this.
        InfrastructureError, ClusterUnreachable: the cluster, or the controller, does not answer.
    """
    with joined(address, name, submission) as run:
        from distplat.actors.overview import stop

        return stop(run, wait_s)


@contextmanager
def joined(address: str | None, name: str, submission: str | None = None) -> Iterator[RunName]:
    """
    Be connected to the Ray in which a run goes on, which must have a part on this machine.

    Args:
        address: as given; a job API's URL stands for the cluster on this machine that it serves.
        name: of the job, or of the run.
        submission: id of its job at the job API; None: it has none.

    Yields:
        The run.

    Raises:
        SpecError: there is no such run, or several; or the address cannot be joined from here.
        ClusterUnreachable: no Ray runs there.
    """
    target = _joinable(address)
    bring_token(target)
    with redirect_stdout(sys.stderr), _way(target, name, submission):
        from distplat.actors.overview import one_run, submitted_run

        yield one_run(name) if submission is None else submitted_run(submission, name)


def _joinable(address: str | None) -> Target:
    """
    Give where to go.

    Raises:
        SpecError: it cannot be joined from here.
    """
    target = target_of(address, os.environ)
    if target.origin and target.kind == "local":
        text = "a local Ray belongs to the run that started it"
        raise SpecError(Problem((target.origin,), text, "leave --address out, or give HOST:6379"))
    if target.kind == "jobs" and host_and_port(target.address)[0] not in LOOPBACK:
        text = f"{target.address} is a job API, and this needs a machine of the cluster"
        raise SpecError(Problem((target.origin,), text, "call it there, without --address"))
    return target


def _way(target: Target, name: str, submission: str | None) -> AbstractContextManager[None]:
    """Give the way to the Ray that was named; or to that of the Rays here which has the run."""
    from distplat.cli.join import connected_here, connected_to, rays_here

    if target.kind == "driver" and target.address != "auto":
        return connected_to(target.address)
    # A URL means one cluster, and no other is asked.
    rays = [] if target.kind == "jobs" else rays_here()
    if len(rays) < 2:
        return connected_here()
    return connected_to(_ray_of(rays, name, submission), own=True)


def _ray_of(rays: Sequence[str], name: str, submission: str | None) -> str:
    """
    Ask several Rays of this machine for a run; give the address of the one that has it.

    Raises:
        SpecError: none has it, or several have one of that name.
        ClusterUnreachable: none answers.
    """
    from distplat.actors.overview import NoSuchRun, find_runs, submitted_run
    from distplat.cli.join import connected_to

    found: list[tuple[str, str]] = []
    unknown: list[Problem] = []
    silent: list[DistplatError] = []
    for address in rays:
        try:
            with connected_to(address, own=True):
                runs = find_runs(name) if submission is None else [submitted_run(submission, name)]
            found += [(address, one.run) for one in runs]
        except SpecError as error:
            told = (replace(one, message=f"{one.message} at {address}") for one in error.problems)
            unknown += told
        except (ClusterUnreachable, InfrastructureError) as error:  # or it is just ending
            silent.append(error)
    if not found and not unknown and silent:
        raise silent[0]
    if not found and not silent:
        raise NoSuchRun(*unknown)
    if not found:
        raise SpecError(*unknown, *(Problem((), str(error)) for error in silent))
    if len({address for address, _ in found}) > 1:
        named = ", ".join(f"{run} at {address}" for address, run in found)
        raise SpecError(Problem((), f"several runs of job {name!r} go on", f"name one: {named}"))
    return found[0][0]
