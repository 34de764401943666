"""
The task's class, looked at before anything is started: is it there, and does it fit the job?

    driver                          child process
    ──────                          ─────────────
    TaskCheck(...)     ──▶          imports the task's module, torch with it
    starts Ray meanwhile            class there? a Task? methods? task_args?
    poll(), result()   ◀── JSON ──  what is wrong, and what is no error but never called

The driver stays without torch and without the user's code. Whoever has the class already asks
`check_class` himself.
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

_LONGEST = 10_000
"""Characters of a message, and of a traceback: they must fit into a pipe that nobody reads yet."""
_LOOK_S = 0.2
"""How often who waits for the answer looks whether the child has ended without one."""
_REST_S = 5.0
"""What a child is given that has ended, or was killed."""

TASKS = "the task's optimizer"
"""Stands for `optimizer` in the list of a job with `optimizer: {name: task}`."""


def said_by_job(job: Job) -> list[str]:
    """Give the fields of a job that say what a method of the task may say instead; or `TASKS`."""
    schedule = ["lr_schedule"] if job.lr_schedule != Schedule() else []
    return [*schedule, TASKS if isinstance(job.optimizer, TaskOptimizer) else "optimizer"]


def check_class(task: object, task_args: Iterable[str], fields: Iterable[str] = ()) -> list[str]:
    """
    Look at a task's class.

    Args:
        task: what should be a task's class.
        task_args: names in `task_args`.
        fields: see `said_by_job`.

    Returns:
        What is no error, but probably not meant: a sentence each.

    Raises:
        SpecError: it is no class of a task, lacks methods, or does not take these arguments.
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
    Look at a train function; gives nothing to say, as `check_class` does where all is meant.

    Args:
        function: what should be one.
        task_args: names in `task_args`.

    Raises:
        SpecError: it is no function, or one that does not take these arguments.
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
    """Look at a task's class, or at a train function, as the job says; see `check_class`."""
    if job.own_loop:
        return check_function(task, job.task_args)
    return check_class(task, job.task_args, said_by_job(job))


def _missing_methods(task: type[Task]) -> list[Problem]:
    """List the methods that a task must have and this one has not."""
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
        return []  # written in C, or with a signature of its own
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
    """Compare what the job says with what the class says itself."""
    problems, name = [], task.__name__
    if "lr_schedule" in fields and overrides(task, "lr"):
        text = f"{name} has lr(), which says the rates itself"
        problems.append(Problem(("lr_schedule",), text, "remove one of the two"))
    if "optimizer" in fields and overrides(task, "optimizer"):
        text = f"{name} has optimizer(), which makes it itself"
        hint = "write `optimizer: {name: task}`, or remove the method"
        problems.append(Problem(("optimizer",), text, hint))
    if TASKS in fields and not overrides(task, "optimizer"):
        text = f"{name} has no optimizer(named_parameters), and the job asks for it"
        hint = "write it, or name one of torch.optim"
        problems.append(Problem(("optimizer", "name"), text, hint))
    return problems


class TaskCheck:
    """
    The check of a task that a job names, in a process of its own.

    Args:
        entry: `module:Class`.
        folder: of the task's module; the child's current directory.
        given: names in `task_args`.
        shown: whether what the module prints is shown, on stderr.
        function: whether it is to be a train function.
        said: see `said_by_job`.
    """

    def __init__(
        self,
        entry: str,
        folder: str,
        given: Iterable[str],
        *,
        shown: bool,
        function: bool = False,
        said: Iterable[str] = (),
    ) -> None:
        self._entry = entry
        home = str(Path(distplat.__file__).resolve().parent.parent)
        fields = {"entry": entry, "folder": folder, "given": [*given], "function": function}
        request = json.dumps({**fields, "said": [*said]})
        # -P: what lies in the task's folder must not stand in for the standard library.
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
        Give `result`, once, when it is there; nothing before and after.

        Raises:
            DistplatError: see `result`.
        """
        if self._reported or self._child.poll() is None:
            return []
        return self.result(None)

    def result(self, limit_s: float | None) -> list[str]:
        """
        Wait for the answer; see `check_class`.

        Args:
            limit_s: seconds; None: it has ended.

        Raises:
            SpecError: the task is not there, or does not fit the job.
            UserCodeError: its module raised, or did not come to an end.
        """
        self._reported = True
        text = self._line(_REST_S if limit_s is None else limit_s)
        if text is None and self._child.poll() is None:
            self.end()
            what = f"the import of {self._entry!r} took longer than {limit_s:g} s"
            raise UserCodeError(None, None, what, "")
        try:
            answer = json.loads(text or b"")
        except ValueError:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_REST_S)
            what = f"the import of {self._entry!r} ended the process, exit code"
            raise UserCodeError(None, None, f"{what} {self._child.returncode}", "") from None
        return _parse_answer(answer)

    def _line(self, limit_s: float) -> bytes | None:
        """
        Read what the child has answered; None: nothing in time.

        The answer is one line, and not all until the pipe ends: processes that the module has
        forked hold its other end for as long as they live.
        """
        received, until = b"", time.monotonic() + limit_s
        assert self._child.stdout is not None, "it is a pipe"
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                ended = self._child.poll() is not None
                left_s = until - time.monotonic()
                if not selector.select(min(_LOOK_S, max(0.0, left_s))):
                    if ended or left_s <= 0:
                        return None
                    continue
                chunk = os.read(self._child.stdout.fileno(), 2**16)
                if not chunk:
                    break
                received += chunk
        return received

    def end(self) -> None:
        """End the child, if it goes on; one that hangs in a disk ends when that answers."""
        if self._child.poll() is None:
            self._child.kill()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_REST_S)
        if self._child.stdout is not None:
            self._child.stdout.close()


@contextmanager
def task_check(job: Job, folder: str, *, shown: bool) -> Iterator[TaskCheck]:
    """Have the task that a job names looked at, until the block ends; see `TaskCheck`."""
    arguments = job.task or "", folder, job.task_args
    check = TaskCheck(*arguments, shown=shown, function=job.own_loop, said=said_by_job(job))
    try:
        yield check
    finally:
        check.end()


def answer() -> None:
    """Run as the child: answer on stdout, and let the user's module print on stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.argv[2])
    result: dict[str, Any] = {}
    try:
        where = request["entry"], request["folder"]
        if request["function"]:
            os.environ.update(ALONE)  # many a script reads them when it is imported
            result["unheard"] = check_function(load_train_function(*where), request["given"])
        else:
            kind = load_task_class(*where)
            result["unheard"] = check_class(kind, request["given"], request["said"])
    except SpecError as error:
        result["problems"] = [asdict(problem) for problem in error.problems]
    except (Exception, SystemExit) as error:
        from distplat.actors.user_errors import as_user_error

        user = as_user_error(error, None, None)
        summary, frames = user.summary[:_LONGEST], user.traceback[-_LONGEST:]
        result["user"] = {"summary": summary, "traceback": frames, "hint": user.remedy}
    sys.stdout.flush()
    out.write(json.dumps(result) + "\n")
    out.close()
    os._exit(0)  # at once: torch takes its time to end, and the answer is out


def _parse_answer(answer: dict[str, Any]) -> list[str]:
    if "problems" in answer:
        problems = [Problem(**{**one, "where": tuple(one["where"])}) for one in answer["problems"]]
        raise SpecError(*problems)
    if "user" in answer:
        user = answer["user"]
        raise UserCodeError(None, None, user["summary"], user["traceback"], user["hint"])
    return [str(line) for line in answer["unheard"]]
