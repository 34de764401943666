"""
Find the user's task, or train function, and send it to the workers.

What the driver pickles of classes that workers cannot import is checked here as well: a value that
does not go along is named.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TypeAlias, cast

import ray

from distplat.platform.errors import Problem, SpecError
from distplat.platform.errors import hint as hint_of
from distplat.strategies.task import Task

TrainFunction: TypeAlias = Callable[..., object]
"""A loop of the user's own; called with the job's `task_args`, or with nothing."""


def load_task_class(entry: str, search_path: str) -> type[Task]:
    """
    Import `module:Class` from a folder or from what is installed.

    Raises:
        SpecError: no such module or class, or the class is no `Task`. What the module itself
            raises while it is imported passes through.
    """
    module, name = _imported(entry, search_path)
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Task):
        return found
    if callable(found) and not isinstance(found, type):
        text = f"{entry} is a function, and the job has the fields of a task"
        hint = "remove optimizer, global_batch_size, epochs and steps: a train function has its own"
        raise SpecError(Problem(("task",), text, hint))
    tasks = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Task)]
    names = [one for one in tasks if one != "Task"]
    what = "has no class" if found is None else "has no subclass of distplat.Task called"
    message = f"module {module.__name__!r} {what} {name!r}"
    raise SpecError(Problem(("task",), message, hint_of(name, names)))


def load_train_function(entry: str, search_path: str) -> TrainFunction:
    """
    Import `module:function`, see `load_task_class`.

    Raises:
        SpecError: no such module or function; or it is a `Task`, whose job needs more fields.
    """
    module, name = _imported(entry, search_path)
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Task):
        raise SpecError(
            *(
                Problem((field,), f"required, but missing: {entry} is a Task")
                for field in ("optimizer", "global_batch_size")
            ),
            Problem(("epochs",), "give `epochs` or `steps`, got neither"),
        )
    if callable(found) and not isinstance(found, type):
        return cast(TrainFunction, found)
    there = [n for n, v in vars(module).items() if isinstance(v, FunctionType)]
    what = "has no function" if found is None else "has no function called"
    message = f"module {module.__name__!r} {what} {name!r}"
    raise SpecError(Problem(("task",), message, hint_of(name, there)))


def _imported(entry: str, search_path: str) -> tuple[ModuleType, str]:
    """Import the module of an entry point; give it, and the name to look for in it."""
    module_name, _, name = entry.partition(":")
    if search_path and search_path not in sys.path:
        sys.path.insert(0, search_path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the user's module exists; one that it imports does not
        there = [path.stem for path in Path(search_path or ".").glob("*.py")]
        near = hint_of(module_name, there) if there else "no Python file is there"
        message = f"could not import {module_name!r} from {search_path or 'the import path'}"
        raise SpecError(Problem(("task",), message, near)) from None
    return module, name


def check_pickles(kind: type[Task] | TrainFunction) -> None:
    """
    See whether a task's class, or a train function, can be sent to the workers.

    Raises:
        SpecError: it cannot; names the attribute, or the variable that a method uses.
    """
    try:
        ray.cloudpickle.dumps(kind)
    except Exception as error:  # whatever an object's own way of being pickled raises
        what = next(_culprits(kind), f"{type(error).__name__}: {error}")
        sort = "class" if isinstance(kind, type) else "function"
        text = f"the {sort} {getattr(kind, '__name__', kind)} cannot be sent to the workers: {what}"
        hint = "make such objects in model(), train_data() or __init__, on the worker"
        raise SpecError(Problem(("task",), text, hint)) from None


def _culprits(kind: type[Task] | TrainFunction) -> Iterator[str]:
    """Say what does not go along, an attribute or something that a method uses."""
    members = (
        vars(kind) if isinstance(kind, type) else {getattr(kind, "__name__", "function"): kind}
    )
    for name, value in members.items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if not inspect.isfunction(function):
            if not name.startswith("__") and not _goes(value):
                yield f"its attribute {name!r} is a {type(value).__name__}"
            continue
        used = inspect.getclosurevars(inspect.unwrap(function))
        for variable, held in {**used.globals, **used.nonlocals}.items():
            if held is not kind and not _goes(held):
                yield f"its {name}() uses {variable!r}, a {type(held).__name__}"


def _goes(value: object) -> bool:
    try:
        ray.cloudpickle.dumps(value)
    except Exception:
        return False
    return True
