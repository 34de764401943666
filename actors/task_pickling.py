"""Classes that the driver pickles for its workers: what in them does not go along, by name."""

import inspect
from collections.abc import Iterator

import ray

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.task import Task


def check_pickles(kind: type[Task]) -> None:
    """
    See whether a task's class can be sent to the workers.

    Raises:
        SpecError: it cannot; names the attribute, or the variable that a method uses.
    """
    try:
        ray.cloudpickle.dumps(kind)
    except Exception as error:  # whatever an object's own way of being pickled raises
        what = next(_culprits(kind), f"{type(error).__name__}: {error}")
        text = f"the class {kind.__name__} cannot be sent to the workers: {what}"
        hint = "make such objects in model(), train_data() or __init__, on the worker"
        raise SpecError(Problem(("task",), text, hint)) from None


def _culprits(kind: type[Task]) -> Iterator[str]:
    """Say what does not go along, an attribute or something that a method uses."""
    for name, value in vars(kind).items():
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
