"""Jobs of train functions, which have their own loop, and the fields that they do not use."""

import shlex
from collections.abc import Mapping
from typing import Any

from distplat.platform.errors import Problem

_LOOP = ("optimizer", "global_batch_size", "epochs", "steps")
"""Fields that every task needs and a train function replaces; a job without them has its own
loop."""

_PLACEHOLDERS: dict[str, Any] = {
    "optimizer": {"name": "SGD", "lr": 1.0},
    "global_batch_size": 1,
    "steps": 1,
}
"""Placeholders for these fields, which are never read."""

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
"""Fields of a task's loop, which a train function replaces."""


def script_of(entry: str | None) -> list[str]:
    """
    Return the script and its arguments if a job's `task` is a script; else [].

    Args:
        entry: such as `train.py --lr 0.1`, or `module:function`.
    """
    head, _, rest = (entry or "").partition(" ")
    return [head, *shlex.split(rest)] if head.endswith(".py") else []


def check_quotes(entry: str) -> str:
    """
    Return a job's `task` if its arguments can be split.

    Raises:
        ValueError: a quotation is not closed.
    """
    try:
        script_of(entry)
    except ValueError as error:
        raise ValueError(f"the script's arguments: {error} (got {entry!r})") from None
    return entry


def script_problems(job: Any) -> list[Problem]:
    """Check fields that cannot be combined with a script as the job's `task`."""
    if not script_of(job.task):
        return []
    if not job.own_loop:
        text = f"{job.task} is a script, which has its own loop"
        return [Problem(("own_loop",), text, "remove it, or write true")]
    hint = f"write them as on a command line: `task: {job.task} --name value`"
    text = "a script takes its arguments from `task`"
    return [Problem(("task_args",), text, hint)] if job.task_args else []


def fill_loop_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Fill in the fields of a loop, for a job without them or whose task is a script.

    Args:
        fields: the given fields.
    """
    task = fields.get("task")
    is_script = isinstance(task, str) and task.partition(" ")[0].endswith(".py")
    has_own_loop = is_script or (bool(task) and not fields.keys() & {*_LOOP})
    if fields.get("own_loop", has_own_loop) is True:
        return {"own_loop": True, **_PLACEHOLDERS, **fields}
    return fields


def problems(job: Any, bare: Any) -> list[Problem]:
    """
    Check for options without effect on a train function.

    Args:
        job: a job of a train function.
        bare: the same job with only its name and strategy.
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
            reason = f"a {kind} says when: report(metrics, checkpoint=...)"
            ineffective.append(Problem(("checkpoint", field), reason, hint))
    if job.checkpoint.trained_only:
        ineffective.append(Problem(("checkpoint", "trained_only"), text, hint))
    if job.failure.non_finite == "skip":
        reason = f"a {kind} cannot leave a step out"
        ineffective.append(Problem(("failure", "non_finite"), reason, "allowed: stop, ignore"))
    return ineffective
