"""
Find, inspect, scale and stop runs from any process that is connected to the same Ray.

The actors of a run have names, in a Ray namespace with the name of the run.
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
    """A running run."""

    run: str
    """Name of the run, unique on the cluster."""
    job: str
    """Name of its job."""

    def actor(self, role: str) -> Any:
        """
        Return the newest actor of a role; the names of replacements contain their attempt.

        Raises:
            ValueError: the run has no such actor, or has ended.
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
    """No run or job of that name is running."""


def find_runs(name: str) -> list[RunName]:
    """
    Find runs on the connected Ray, the oldest first.

    Args:
        name: name of a job or a run.

    Raises:
        NoSuchRun: no run or job of that name is running.
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
        advice = hint(name, known, "running") if known else "the cluster has no runs"
        raise NoSuchRun(Problem((), f"no run or job {name!r} is running", advice))
    return matches  # sorted by name, which ends with the start time


def named_actors() -> dict[str, list[str]]:
    """Return the names of all named actors by namespace; distplat's namespaces are runs."""
    names: dict[str, list[str]] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        names.setdefault(actor["namespace"], []).append(actor["name"])
    return names


def _attempt(name: str) -> tuple[int, ...]:
    """Return the numbers of `attempt-3`, or of `attempt-3.1`, a worker started before it."""
    numbers = name.rsplit("-", 1)[1] if "/attempt-" in name else "0"
    return tuple(map(int, numbers.split(".")))


ANSWER_S = 10.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Overview:
    """The roles of one run."""

    run: str
    job: str
    servers: ServerGroupStatus | None
    """None: the run has no server group."""
    scheduler: SchedulerStatus | None
    """None: the run has no task scheduler."""
    scale: ScaleStatus = NO_SCALE_REQUEST
    """Status of the last scale request."""


def one_run(name: str) -> RunName:
    """
    Find the only run of a name.

    Raises:
        SpecError: no run has that name, or several runs of that job are running.
    """
    runs = find_runs(name)
    if len(runs) > 1:
        text = f"several runs of job {name!r} are active"
        raise SpecError(Problem((), text, "name one: " + ", ".join(run.run for run in runs)))
    return runs[0]


def overview(run: RunName) -> Overview:
    """
    Return the status of a run, from its server manager, task scheduler and controller.

    Raises:
        ActorLost, DeadlineExceeded: an actor is lost or does not answer.
    """
    servers = _ask(run, "server-manager", "seen")
    scheduler = _ask(run, "task-scheduler", "status")
    status = _ask(run, "controller", "scale_status")
    return Overview(run.run, run.job, servers, scheduler, status or NO_SCALE_REQUEST)


def scale(run: RunName, workers: int, wait_s: float) -> Overview:
    """
    Change the number of workers of a run.

    Args:
        run: the run.
        workers: new number of workers.
        wait_s: seconds to wait until it is reached; 0: do not wait.

    Raises:
        SpecError: the run cannot have that number of workers.
        DeadlineExceeded: the number is not reached yet; the request stays in effect.
        ActorLost: the run is over.
    """
    request: ScaleRequest | None = _ask(run, "controller", "scale", workers)
    if request is None:
        raise ActorLost("controller", None, f"run {run.run} is over")
    deadline = time.monotonic() + wait_s
    while True:
        status = _ask(run, "controller", "scale_status")
        scheduler = _ask(run, "task-scheduler", "status")
        if status is None or scheduler is None:
            raise ActorLost("controller", None, f"run {run.run} is over")
        _check_pending(request, status)
        if wait_s == 0 or (not status.pending and len(scheduler.workers) == workers):
            return Overview(run.run, run.job, None, scheduler, status)
        if time.monotonic() > deadline:
            what = f"{workers} workers instead of {len(scheduler.workers)}"
            raise DeadlineExceeded(what, ("workers",), wait_s, "--wait-s")
        time.sleep(_POLL_S)


def submitted_run(submission: str, job: str) -> RunName:
    """
    Find the run of a driver that was started through Ray's job API.

    Args:
        submission: id of the driver in the job API.
        job: name of the job; other runs may have the same.

    Raises:
        SpecError: the driver has no run, or not yet.
    """
    for run in find_runs(job):
        try:
            submission_id = _ask(run, "controller", "submission")
        except InfrastructureError:  # another run that has just ended or hangs
            continue
        if submission_id == submission:
            return run
    raise SpecError(Problem((), f"{submission!r} has no active run"))


def stop(run: RunName, wait_s: float) -> str:
    """
    Stop a run with a checkpoint, like Ctrl-C in its driver.

    Args:
        run: the run.
        wait_s: seconds to wait until it has ended; 0: do not wait.

    Returns:
        `STOPPED`, `SUCCEEDED` or `FAILED`; `RUNNING`: it has not ended yet.

    Raises:
        ActorLost, DeadlineExceeded: the controller is lost or does not answer.
    """
    status: str | None = _ask(run, "controller", "stop", wait_s, True, takes_s=wait_s)
    if status is None:
        raise ActorLost("controller", None, f"run {run.run} has no controller")
    return status


def _check_pending(request: ScaleRequest, status: ScaleStatus) -> None:
    """
    Check that a request is still in effect.

    Raises:
        SpecError: the request was refused, or replaced by a later one.
    """
    latest = status.request
    # A later request for the same number may be this one, executed twice by a repeated call.
    if latest is not None and latest.number > request.number and latest.workers != request.workers:
        text = f"a later request for {latest.workers} workers has replaced this one"
        raise SpecError(Problem(("--workers",), text))
    if status.refused:
        raise SpecError(Problem(("--workers",), status.refused))


def _ask(run: RunName, role: str, method: str, *args: Any, takes_s: float = 0.0) -> Any:
    """
    Call an actor of a run; None: the run has no such role.

    Args:
        run: the run.
        role: role of the actor.
        method: method to call.
        args: arguments of the call.
        takes_s: seconds that the method itself may take.

    Raises:
        ActorLost, DeadlineExceeded: the actor is lost or does not answer.
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
