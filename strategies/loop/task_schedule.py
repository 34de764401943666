"""The learning rates that a task says itself: a factor for each step, asked before the first."""

from __future__ import annotations

import hashlib
import math
from array import array
from numbers import Real

from distplat.platform.lr_schedules import TaskSchedule
from distplat.platform.spec import Job
from distplat.strategies.loop.checks import place
from distplat.strategies.loop.seeding import seed_all
from distplat.strategies.task import Task, has_lr, method_of


def with_task_schedule(job: Job, task: Task, steps: int) -> Job:
    """
    Give the job with the rates that its task says; the job as it is, where the task says none.

    Args:
        job: the run.
        task: the user's.
        steps: of the run.

    Raises:
        ValueError: a factor is no number, negative or not finite; names the step.
    """
    if not has_lr(type(task)):
        return job
    seed_all(job.seed)
    own = method_of(task, "lr")
    factors = array("d", (_factor(task, own(step, steps), step) for step in range(steps)))
    return job.with_schedule(TaskSchedule(factors))


def schedule_digest(job: Job) -> str:
    """Fingerprint what a task says of the rates; empty: nothing."""
    own = job.task_schedule
    return "" if own is None else hashlib.sha256(own.factors.tobytes()).hexdigest()[:16]


def _factor(task: Task, found: object, step: int) -> float:
    wrong = f"{place(task, 'lr')}lr() must give a number, 0 or more"
    if not isinstance(found, Real) or isinstance(found, bool):
        hint = ": is there a `return`?" if found is None else ""
        raise ValueError(f"{wrong}; got a {type(found).__name__} for step {step}{hint}")
    factor = float(found)
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"{wrong}; got {factor} for step {step}")
    return factor
