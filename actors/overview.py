"""
Runs seen from outside: which there are, how their roles are doing; they are scaled and ended.

A run's actors are named, in a namespace of the run's own name. So any process that is connected to
the same Ray finds them, and nothing has to be told where they are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from distplat.actors.ray_transport import RayTransport
from distplat.actors.retrying_calls import ask
from distplat.actors.servers.scheduler import SchedulerStatus
from distplat.platform.errors import (
    ActorLost,
    DeadlineExceeded,
    DistplatError,
    InfrastructureError,
    Problem,
    SpecError,
    hint,
)
from distplat.platform.scaling import NO_SCALE_REQUEST, ScaleRequest, ScaleStatus
from distplat.platform.server_group import ServerGroupStatus


@dataclass(frozen=True)
class RunName:
    """A run that goes on."""

    run: str
    """Its name: unique on the cluster."""
    job: str
    """The name of its job."""

    def actor(self, role: str) -> Any:
        """
        Give the newest actor of a role: one that was replaced has an attempt in its name.

        Raises:
            ValueError: there is none, or no more.
        """
        first = f"{self.job}/{role}"
        names = [
            name
            for name in named_actors().get(self.run, [])
            if name == first or name.startswith(f"{first}/attempt-")
        ]
        if not names:
            raise ValueError(f"run {self.run} has no {role}")
        return ray.get_actor(max(names, key=_attempt), namespace=self.run)


class NoSuchRun(SpecError):
    """Nothing of that name is running."""


def find_runs(name: str) -> list[RunName]:
    """
    Find runs on the Ray that this process is connected to, the oldest first.

    Args:
        name: of a job, or of a run.

    Raises:
        NoSuchRun: nothing of that name is running.
        DistplatError: this process is not connected to Ray.
    """
    if not ray.is_initialized():
        raise DistplatError("not connected to Ray: call ray.init(address=...) first")
    runs = {
        run: names[0].split("/")[0]
        for run, names in sorted(named_actors().items())
        if "/" in names[0]
    }
    matches = [RunName(run, job) for run, job in runs.items() if name in (run, job)]
    if not matches:
        known = {*runs, *runs.values()}
        advice = hint(name, known, "running") if known else "nothing runs there"
        raise NoSuchRun(Problem((), f"no run or job {name!r} is running", advice))
    return matches  # names of runs end with the time


def named_actors() -> dict[str, list[str]]:
    """Give the names of all named actors by namespace, which for ours is the run."""
    names: dict[str, list[str]] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        names.setdefault(actor["namespace"], []).append(actor["name"])
    return names


def _attempt(name: str) -> tuple[int, ...]:
    """Read `attempt-3`, or `attempt-3.1` of a worker that was made before that attempt began."""
    numbers = name.rsplit("-", 1)[1] if "/attempt-" in name else "0"
    return tuple(map(int, numbers.split(".")))


ANSWER_S = 10.0
_AGAIN_S = 0.2


@dataclass(frozen=True)
class Overview:
    """The roles of one run."""

    run: str
    job: str
    servers: ServerGroupStatus | None
    """None: the run has no server group."""
    scheduler: SchedulerStatus | None
    """None: it has no task scheduler."""
    scale: ScaleStatus = NO_SCALE_REQUEST
    """What became of the last request for another number of workers."""


def one_run(name: str) -> RunName:
    """
    Find the run that a name means.

    Raises:
        SpecError: there is none, or there are several of that job.
    """
    runs = find_runs(name)
    if len(runs) > 1:
        text = f"several runs of job {name!r} go on"
        raise SpecError(Problem((), text, "name one: " + ", ".join(run.run for run in runs)))
    return runs[0]


def overview(run: RunName) -> Overview:
    """
    Ask a run's server manager, its task scheduler and its controller.

    Raises:
        ActorLost, DeadlineExceeded: they are gone, or do not answer.
    """
    servers = _ask(run, "server-manager", "seen")
    scheduler = _ask(run, "task-scheduler", "status")
    status = _ask(run, "controller", "scale_status")
    return Overview(run.run, run.job, servers, scheduler, status or NO_SCALE_REQUEST)


def scale(run: RunName, workers: int, wait_s: float) -> Overview:
    """
    Have workers join or leave a run.

    Args:
        run: which.
        workers: how many there are to be.
        wait_s: how long to wait for it; 0: not at all.

    Raises:
        SpecError: it cannot be had; says why.
        DeadlineExceeded: it is not so yet; the request stands.
        ActorLost: the run is over.
    """
    request: ScaleRequest | None = _ask(run, "controller", "scale", workers)
    if request is None:
        raise ActorLost("controller", None, f"run {run.run} is over")
    until = time.monotonic() + wait_s
    while True:
        status = _ask(run, "controller", "scale_status")
        scheduler = _ask(run, "task-scheduler", "status")
        if status is None or scheduler is None:
            raise ActorLost("controller", None, f"run {run.run} is over")
        _check_pending(request, status)
        if wait_s == 0 or (not status.pending and len(scheduler.workers) == workers):
            return Overview(run.run, run.job, None, scheduler, status)
        if time.monotonic() > until:
            what = f"{workers} workers instead of {len(scheduler.workers)}"
            raise DeadlineExceeded(what, ("workers",), wait_s, "--wait-s")
        time.sleep(_AGAIN_S)


def submitted_run(submission: str, job: str) -> RunName:
    """
    Find the run of a driver that the job API started.

    Args:
        submission: its id.
        job: the name of its job, which others may have too.

    Raises:
        SpecError: there is none, or none yet.
    """
    for run in find_runs(job):
        try:
            id_there = _ask(run, "controller", "submission")
        except InfrastructureError:  # another that is just over, or hangs
            continue
        if id_there == submission:
            return run
    raise SpecError(Problem((), f"{submission!r} has no run that goes on"))


def stop(run: RunName, wait_s: float) -> str:
    """
    End a run in order, as Ctrl-C does at its driver: with a checkpoint.

    Args:
        run: which.
        wait_s: how long to wait until it has ended; 0: not at all.

    Returns:
        `STOPPED`, `SUCCEEDED` or `FAILED`; `RUNNING`: it was asked, and has not ended yet.

    Raises:
        ActorLost, DeadlineExceeded: it has no controller, or that does not answer.
    """
    status: str | None = _ask(run, "controller", "stop", wait_s, True, takes_s=wait_s)
    if status is None:
        raise ActorLost("controller", None, f"run {run.run} has none")
    return status


def _check_pending(request: ScaleRequest, status: ScaleStatus) -> None:
    """
    Look whether a request is still to be carried out.

    Raises:
        SpecError: it was refused, or there is a later one.
    """
    latest = status.request
    # The same number once more may be this request: it was carried out twice on its way.
    if latest is not None and latest.number > request.number and latest.workers != request.workers:
        text = f"{latest.workers} workers were asked for meanwhile"
        raise SpecError(Problem(("--workers",), text))
    if status.refused:
        raise SpecError(Problem(("--workers",), status.refused))


def _ask(run: RunName, role: str, method: str, *args: Any, takes_s: float = 0.0) -> Any:
    """
    Ask an actor of a run; None: there is none of that role.

    Args:
        run: whose.
        role: which.
        method: is called.
        args: of the call.
        takes_s: how long it may take to be carried out.

    Raises:
        ActorLost, DeadlineExceeded: it is gone, or does not answer.
    """
    try:
        actor = run.actor(role)
    except ValueError:
        return None
    call = partial(RayTransport().call, actor, method, *args)
    try:
        return ask(RayTransport(), "an answer", {role: call}, takes_s + ANSWER_S, "")[0]
    except ActorLost:
        raise ActorLost(role, None, f"run {run.run} is over") from None
