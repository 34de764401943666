"""
Validation of the task's class in a child process, before any actor starts.

    driver                          child process
    ──────                          ─────────────
    TaskCheck(...)     ──▶          imports the task's module, and torch
    starts Ray meanwhile            checks class, methods and task_args
    poll(), result()   ◀── JSON ──  errors, and warnings about methods that nothing calls

The driver imports neither torch nor the user's code. A caller that has the class already, such as
`Trainer`, calls `check_class` directly.
"""

from __future__ import annotations

import inspect
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import distplat
from distplat.actors.task_loading import (
    load_task_class,
    load_train_function,
    needed_arguments,
    takes_names,
)
from distplat.platform.errors import Problem, SpecError, UserCodeError, hint
from distplat.platform.lr_schedules import Schedule
from distplat.platform.optimizers import TaskOptimizer
from distplat.platform.spec import Job
from distplat.platform.torchrun import ALONE
from distplat.strategies.task import Task, overrides
from distplat.strategies.task_methods import near_miss, uncalled_hooks

_CHILD = """
import sys
sys.path.append(sys.argv[1])
from distplat.actors.task_check import answer
answer()
"""

_MAX_CHARS = 10_000
"""Maximum characters of a message and of a traceback: both must fit into the pipe's buffer."""
_POLL_S = 0.2
"""Interval between checks whether the child exited without an answer."""
_EXIT_TIMEOUT_S = 5.0
"""Timeout for reaping a child that exited or was killed."""

TASK_OPTIMIZER = "the task's optimizer"
"""Replaces `optimizer` in `overlapping_fields` of a job with `optimizer: {name: task}`."""


def overlapping_fields(job: Job) -> list[str]:
    """Return the fields of a job that methods of the task may define instead."""
    schedule = ["lr_schedule"] if job.lr_schedule != Schedule() else []
    return [*schedule, TASK_OPTIMIZER if isinstance(job.optimizer, TaskOptimizer) else "optimizer"]


def check_class(task: object, task_args: Iterable[str], fields: Iterable[str] = ()) -> list[str]:
    """
    Check that an object is a task class that fits the job.

    Args:
        task: the object under the name that the job gives.
        task_args: names of the constructor arguments.
        fields: see `overlapping_fields`.

    Returns:
        Warnings, one sentence each.

    Raises:
        SpecError: the object is not a task class, lacks methods, or does not accept the arguments.
    """
    if isinstance(task, Task):
        name = type(task).__name__
        text = f"must be the task's class, got an instance of {name}: each worker makes its own"
        raise SpecError(Problem(("task",), text, f"give {name}; its arguments go to `task_args`"))
    if not (isinstance(task, type) and issubclass(task, Task)):
        got = task.__name__ if isinstance(task, type) else f"a {type(task).__name__}"
        raise SpecError(Problem(("task",), f"must be a subclass of distplat.Task, got {got}"))
    problems = _missing_methods(task) + _argument_problems(task, [*task_args])
    problems += _conflicts(task, [*fields])
    if problems:
        raise SpecError(*problems)
    return uncalled_hooks(task)


def check_function(function: object, task_args: Iterable[str]) -> list[str]:
    """
    Check that an object is a train function that accepts the job's arguments.

    Args:
        function: the object under the name that the job gives.
        task_args: names of the function's arguments.

    Returns:
        No warnings; the signature matches `check_class`.

    Raises:
        SpecError: the object is not a function, or does not accept the arguments.
    """
    if isinstance(function, type) or not callable(function):
        text = f"must be a train function, got a {type(function).__name__}"
        raise SpecError(Problem(("task",), text, "give optimizer, global_batch_size and steps"))
    name = getattr(function, "__name__", "the function")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        text = f"{name} is a coroutine or a generator: nothing in it would run"
        raise SpecError(Problem(("task",), text, "write a plain function"))
    task_args = [*task_args]
    if takes_names(function, task_args):
        if any(p.kind is p.POSITIONAL_ONLY for p in needed_arguments(function)):
            text = f"{name} takes positional-only arguments, and `task_args` has names"
            raise SpecError(Problem(("task",), text, "remove the / from its parameters"))
        if problems := _argument_problems(function, task_args):
            raise SpecError(*problems)
    return []


def check_task(task: object, job: Job) -> list[str]:
    """Check the task class or the train function of a job; see `check_class`."""
    if job.own_loop:
        return check_function(task, job.task_args)
    return check_class(task, job.task_args, overlapping_fields(job))


def _missing_methods(task: type[Task]) -> list[Problem]:
    """Return a problem for each abstract method that the task does not implement."""
    missing = set(getattr(task, "__abstractmethods__", ()))
    own_methods = [name for name in dir(task) if not name.startswith("_") and name not in dir(Task)]
    near_misses = {hook: name for name in own_methods if (hook := near_miss(name, missing))}
    return [
        Problem(
            ("task",),
            f"{task.__name__} has no {name}()",
            f"did you mean {near_misses[name]}() to be it?" if name in near_misses else "",
        )
        for name in sorted(missing)
    ]


def _argument_problems(target: Callable[..., object], task_args: list[str]) -> list[Problem]:
    """Compare `task_args` with a task's constructor, or with a train function."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []  # a C function, or a class with an invalid `__signature__`
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    called = getattr(target, "__name__", "the function")
    problems = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        problems = [
            Problem(("task_args", name), f"{called} takes no such argument", hint(name, names))
            for name in task_args
            if name not in names
        ]
    lacking = [p.name for p in named if p.default is p.empty and p.name not in task_args]
    problems += [
        Problem(("task_args",), f"{called} needs the argument {name!r}", "give it a value")
        for name in lacking
    ]
    return problems


def _conflicts(task: type[Task], fields: list[str]) -> list[Problem]:
    """Return a problem for each setting that both the job and the class define."""
    problems, name = [], task.__name__
    if "lr_schedule" in fields and overrides(task, "lr"):
        text = f"{name} has lr(), which says the rates itself"
        problems.append(Problem(("lr_schedule",), text, "remove one of the two"))
    if "optimizer" in fields and overrides(task, "optimizer"):
        text = f"{name} has optimizer(), which makes it itself"
        hint = "write `optimizer: {name: task}`, or remove the method"
        problems.append(Problem(("optimizer",), text, hint))
    if TASK_OPTIMIZER in fields and not overrides(task, "optimizer"):
        text = f"{name} has no optimizer(named_parameters), and the job asks for it"
        hint = "write it, or name one of torch.optim"
        problems.append(Problem(("optimizer", "name"), text, hint))
    return problems


class TaskCheck:
    """
    The check of a job's task in a child process.

    Args:
        entry: `module:Class`.
        folder: directory of the task's module, and working directory of the child.
        task_args: names of the task's arguments.
        shown: whether the module's output is forwarded to stderr.
        function: whether `entry` names a train function.
        fields: see `overlapping_fields`.
    """

    def __init__(
        self,
        entry: str,
        folder: str,
        task_args: Iterable[str],
        *,
        shown: bool,
        function: bool = False,
        fields: Iterable[str] = (),
    ) -> None:
        self._entry = entry
        home = str(Path(distplat.__file__).resolve().parent.parent)
        target = {"entry": entry, "folder": folder, "function": function}
        request = json.dumps({**target, "task_args": [*task_args], "fields": [*fields]})
        # -P: a file in the task's folder must not shadow a module of the standard library.
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, home, request],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if shown else subprocess.DEVNULL,
            cwd=folder if Path(folder).is_dir() else None,
        )
        self._reported = False

    def poll(self) -> list[str]:
        """
        Return the warnings once the child has exited; an empty list before and after.

        Raises:
            DistplatError: see `result`.
        """
        if self._reported or self._child.poll() is None:
            return []
        return self.result(None)

    def result(self, limit_s: float | None) -> list[str]:
        """
        Wait for the child's answer and return its warnings; see `check_class`.

        Args:
            limit_s: deadline in seconds; None: the child has exited.

        Raises:
            SpecError: the task is missing, or does not fit the job.
            UserCodeError: the import of its module raised, or exceeded the deadline.
        """
        self._reported = True
        text = self._line(_EXIT_TIMEOUT_S if limit_s is None else limit_s)
        if text is None and self._child.poll() is None:
            self.end()
            what = f"the import of {self._entry!r} took longer than {limit_s:g} s"
            raise UserCodeError(None, None, what, "")
        try:
            answer = json.loads(text or b"")
        except ValueError:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_EXIT_TIMEOUT_S)
            what = f"the import of {self._entry!r} ended the process, exit code"
            raise UserCodeError(None, None, f"{what} {self._child.returncode}", "") from None
        return _parse_answer(answer)

    def _line(self, limit_s: float) -> bytes | None:
        """
        Read the child's answer; None: no answer before the deadline.

        The answer ends with a newline. Reading until EOF would block: processes that the module
        forked keep the other end of the pipe open.
        """
        received, deadline = b"", time.monotonic() + limit_s
        assert self._child.stdout is not None, "it is a pipe"
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                exited = self._child.poll() is not None
                left_s = deadline - time.monotonic()
                if not selector.select(min(_POLL_S, max(0.0, left_s))):
                    if exited or left_s <= 0:
                        return None
                    continue
                chunk = os.read(self._child.stdout.fileno(), 2**16)
                if not chunk:
                    break
                received += chunk
        return received

    def end(self) -> None:
        """Kill the child if it runs; a child blocked in disk I/O dies when the disk answers."""
        if self._child.poll() is None:
            self._child.kill()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_EXIT_TIMEOUT_S)
        if self._child.stdout is not None:
            self._child.stdout.close()


@contextmanager
def task_check(job: Job, folder: str, *, shown: bool) -> Iterator[TaskCheck]:
    """Check the job's task in a child process, which is killed at the end of the block."""
    arguments = job.task or "", folder, job.task_args
    fields = overlapping_fields(job)
    check = TaskCheck(*arguments, shown=shown, function=job.own_loop, fields=fields)
    try:
        yield check
    finally:
        check.end()


def answer() -> None:
    """Entry point of the child: write the answer to stdout; the user's module prints to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.argv[2])
    result: dict[str, Any] = {}
    try:
        target = request["entry"], request["folder"]
        if request["function"]:
            os.environ.update(ALONE)  # scripts may read torchrun's variables at import
            function = load_train_function(*target)
            result["warnings"] = check_function(function, request["task_args"])
        else:
            task = load_task_class(*target)
            result["warnings"] = check_class(task, request["task_args"], request["fields"])
    except SpecError as error:
        result["problems"] = [asdict(problem) for problem in error.problems]
    except (Exception, SystemExit) as error:
        from distplat.actors.user_errors import as_user_error

        user = as_user_error(error, None, None)
        summary, frames = user.summary[:_MAX_CHARS], user.traceback[-_MAX_CHARS:]
        result["user"] = {"summary": summary, "traceback": frames, "hint": user.remedy}
    sys.stdout.flush()
    out.write(json.dumps(result) + "\n")
    out.close()
    os._exit(0)  # skips torch's slow shutdown: the answer is complete


def _parse_answer(answer: dict[str, Any]) -> list[str]:
    if "problems" in answer:
        raise SpecError(*(Problem(**{**p, "where": tuple(p["where"])}) for p in answer["problems"]))
    if "user" in answer:
        user = answer["user"]
        raise UserCodeError(None, None, user["summary"], user["traceback"], user["hint"])
    return [str(line) for line in answer["warnings"]]
