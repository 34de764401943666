"""How a run's roles are doing, and how its number of workers is changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from distplat.actors.runs import RunName, find_runs
from distplat.actors.servers.scheduler import SchedulerStatus
from distplat.platform.errors import ActorLost, DeadlineExceeded, Problem, SpecError
from distplat.platform.server_group import ServersSeen

ANSWER_S = 10.0
_AGAIN_S = 0.2


@dataclass(frozen=True)
class Overview:
    """The roles of one run."""

    run: str
    job: str
    servers: ServersSeen | None
    """None: the run has no server group."""
    roster: SchedulerStatus | None
    """None: it has no task scheduler."""


def one_run(name: str) -> RunName:
    """
    Find the run that a name means.

    Raises:
        SpecError: there is none, or there are several of that job.
    """
    found = find_runs(name)
    if len(found) > 1:
        text = f"several runs of job {name!r} go on"
        raise SpecError(Problem((), text, "name one: " + ", ".join(one.run for one in found)))
    return found[0]


def overview(run: RunName) -> Overview:
    """
    Ask a run's server manager and its task scheduler.

    Raises:
        ActorLost, DeadlineExceeded: they are gone, or do not answer.
    """
    seen = _ask(run, "server-manager", lambda actor: actor.seen.remote())
    roster = _ask(run, "task-scheduler", lambda actor: actor.roster.remote())
    return Overview(run.run, run.job, seen, roster)


def scale(run: RunName, workers: int, wait_s: float) -> SchedulerStatus:
    """
    Have workers join or leave a run.

    Args:
        run: which.
        workers: how many there are to be.
        wait_s: how long to wait for it; 0: not at all.

    Raises:
        SpecError: it cannot be had; says why.
        DeadlineExceeded: it is not so yet; the wish stands.
        ActorLost: the run is over.
    """
    wish = _ask(run, "task-scheduler", lambda actor: actor.scale.remote(workers))
    if wish is None:
        text = f"run {run.run} has no task scheduler: only runs with parameter servers have one"
        raise SpecError(Problem((), text))
    until = time.monotonic() + wait_s
    while True:
        roster: SchedulerStatus | None = _ask(
            run, "task-scheduler", lambda actor: actor.roster.remote()
        )
        if roster is None:
            raise ActorLost("task-scheduler", None, f"run {run.run} is over")
        if roster.wish is None:
            cause = "it was lost, and the one that follows it does not know the wish: ask again"
            raise ActorLost("task-scheduler", None, cause)
        if roster.wish.number == wish.number and roster.refused:
            raise SpecError(Problem(("--workers",), roster.refused))
        if roster.wish is not None and roster.wish.number > wish.number:
            text = f"{roster.wish.workers} workers were asked for meanwhile"
            raise SpecError(Problem(("--workers",), text))
        if wait_s == 0 or (not roster.pending and len(roster.workers) == workers):
            return roster
        if time.monotonic() > until:
            what = f"{workers} workers instead of {len(roster.workers)}"
            raise DeadlineExceeded(what, ("workers",), wait_s, "--wait-s")
        time.sleep(_AGAIN_S)


def _ask(run: RunName, role: str, question: Callable[[Any], Any]) -> Any:
    """
    Ask an actor of a run; None: there is none of that role.

    Raises:
        ActorLost, DeadlineExceeded: it is gone, or does not answer.
    """
    try:
        actor = run.actor(role)
    except ValueError:
        return None
    try:
        return ray.get(question(actor), timeout=ANSWER_S)
    except ray.exceptions.GetTimeoutError:
        raise DeadlineExceeded("an answer", (role,), ANSWER_S, "none") from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError:
        raise ActorLost(role, None, f"run {run.run} is over") from None
