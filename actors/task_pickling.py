"""Classes that the driver pickles for its workers: what in them does not go along, by name."""

import inspect
from collections.abc import Iterator

import ray

from distplat.actors.task_loading import TrainFunction
from distplat.platform.errors import Problem, SpecError
from distplat.strategies.task import Task


def check_pickles(kind: type[Task] | TrainFunction) -> None:
    """
    See whether a task's class, or a train function, can be sent to the workers.

    Raises:
        SpecError: it cannot; names the attribute, or the variable that a method uses.
    """
    try:
        ray.cloudpickle.dumps(kind)
    except Exception as error:  # whatever an object's own way of being pickled raises
        what = next(_unpicklable_parts(kind), f"{type(error).__name__}: {error}")
        sort = "class" if isinstance(kind, type) else "function"
        text = f"the {sort} {getattr(kind, '__name__', kind)} cannot be sent to the workers: {what}"
        hint = "make such objects in model(), train_data() or __init__, on the worker"
        raise SpecError(Problem(("task",), text, hint)) from None


def _unpicklable_parts(kind: type[Task] | TrainFunction) -> Iterator[str]:
    """Say what does not go along, an attribute or something that a method uses."""
    members = (
        vars(kind) if isinstance(kind, type) else {getattr(kind, "__name__", "function"): kind}
    )
    for name, value in members.items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if not inspect.isfunction(function):
            if not name.startswith("__") and not _is_picklable(value):
                yield f"its attribute {name!r} is a {type(value).__name__}"
            continue
        used = inspect.getclosurevars(inspect.unwrap(function))
        for variable, held in {**used.globals, **used.nonlocals}.items():
            if held is not kind and not _is_picklable(held):
                yield f"its {name}() uses {variable!r}, a {type(held).__name__}"


def _is_picklable(value: object) -> bool:
    try:
        ray.cloudpickle.dumps(value)
    except Exception:
        return False
    return True
