"""Check that a task class or train function can be pickled; name the part that cannot."""

import inspect
from collections.abc import Iterator

import ray

from distplat.actors.task_loading import TrainFunction
from distplat.platform.errors import Problem, SpecError
from distplat.strategies.task import Task


def check_pickles(task: type[Task] | TrainFunction) -> None:
    """
    Check that a task class, or a train function, can be pickled for the workers.

    Raises:
        SpecError: pickling failed; names the attribute, or the variable that a method uses.
    """
    try:
        ray.cloudpickle.dumps(task)
    except Exception as error:  # a custom `__reduce__` may raise any exception
        what = next(_unpicklable_parts(task), f"{type(error).__name__}: {error}")
        noun = "class" if isinstance(task, type) else "function"
        text = f"the {noun} {getattr(task, '__name__', task)} cannot be sent to the workers: {what}"
        hint = "make such objects in model(), train_data() or __init__, on the worker"
        raise SpecError(Problem(("task",), text, hint)) from None


def _unpicklable_parts(task: type[Task] | TrainFunction) -> Iterator[str]:
    """Describe each attribute, and each variable that a method uses, that cannot be pickled."""
    members = (
        vars(task) if isinstance(task, type) else {getattr(task, "__name__", "function"): task}
    )
    for name, value in members.items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if not inspect.isfunction(function):
            if not name.startswith("__") and not _is_picklable(value):
                yield f"its attribute {name!r} is a {type(value).__name__}"
            continue
        used = inspect.getclosurevars(inspect.unwrap(function))
        for variable, content in {**used.globals, **used.nonlocals}.items():
            if content is not task and not _is_picklable(content):
                yield f"its {name}() uses {variable!r}, a {type(content).__name__}"


def _is_picklable(value: object) -> bool:
    try:
        ray.cloudpickle.dumps(value)
    except Exception:
        return False
    return True
