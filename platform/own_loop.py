"""The job of a train function, which has a loop of its own: what it does without."""

import shlex
from collections.abc import Mapping
from typing import Any

from distplat.platform.errors import Problem

_LOOP = ("optimizer", "global_batch_size", "epochs", "steps")
"""What every task needs, and a train function says itself: a job with none of them has one."""

_FILLED: dict[str, Any] = {
    "optimizer": {"name": "SGD", "lr": 1.0},
    "global_batch_size": 1,
    "steps": 1,
}
"""What stands in these fields then; nobody reads it."""

OF_TASKS = (
    *_LOOP,
    "lr_schedule",
    "embeddings",
    "initial_weights",
    "gradient_accumulation",
    "clip_norm",
    "ema",
    "precision",
    "compile",
    "activation_checkpointing",
    "data",
    "evaluation",
)
"""Fields of what the loop of a task does, and a train function does itself."""


def script_of(entry: str | None) -> list[str]:
    """
    Give a script and its arguments, where a job's `task` is one; else nothing.

    Args:
        entry: as `train.py --lr 0.1`, or `module:function`.
    """
    head, _, rest = (entry or "").partition(" ")
    return [head, *shlex.split(rest)] if head.endswith(".py") else []


def check_quotes(entry: str) -> str:
    """
    Give a job's `task` back, whose arguments can be told apart.

    Raises:
        ValueError: they cannot, as a quotation does not end.
    """
    try:
        script_of(entry)
    except ValueError as error:
        raise ValueError(f"the script's arguments: {error} (got {entry!r})") from None
    return entry


def script_problems(job: Any) -> list[Problem]:
    """Name what a script, as the job's `task`, does not go with."""
    if not script_of(job.task):
        return []
    if not job.own_loop:
        text = f"{job.task} is a script, which has its own loop"
        return [Problem(("own_loop",), text, "remove it, or write true")]
    hint = f"write them as on a command line: `task: {job.task} --name value`"
    text = "a script takes its arguments from `task`"
    return [Problem(("task_args",), text, hint)] if job.task_args else []


def filled(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Have the fields of a job do without those of a loop, where it has none or its task is a script.

    Args:
        fields: as they were written.
    """
    task = fields.get("task")
    is_script = isinstance(task, str) and task.partition(" ")[0].endswith(".py")
    has_own_loop = is_script or (bool(task) and not fields.keys() & {*_LOOP})
    if fields.get("own_loop", has_own_loop) is True:
        return {"own_loop": True, **_FILLED, **fields}
    return fields


def problems(job: Any, bare: Any) -> list[Problem]:
    """
    Name what would have no effect: an option that has none is an error.

    Args:
        job: a job of a train function.
        bare: another, with nothing but its name and strategy.
    """
    kind = "script" if script_of(job.task) else "train function"
    text, hint = f"has no effect on a {kind}, which has its own loop", "remove it"
    ineffective = [
        Problem((field,), text, hint)
        for field in OF_TASKS
        if getattr(job, field) != getattr(bare, field)
    ]
    for field in ("every_steps", "every_epochs"):
        if getattr(job.checkpoint, field) is not None:
            how = f"a {kind} says when: report(metrics, checkpoint=...)"
            ineffective.append(Problem(("checkpoint", field), how, hint))
    if job.checkpoint.trained_only:
        ineffective.append(Problem(("checkpoint", "trained_only"), text, hint))
    if job.failure.non_finite == "skip":
        how = f"a {kind} cannot leave a step out"
        ineffective.append(Problem(("failure", "non_finite"), how, "allowed: stop, ignore"))
    return ineffective
