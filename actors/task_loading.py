"""Find the user's task."""

import importlib
import sys
from pathlib import Path

from distplat.platform.errors import Problem, SpecError, hint
from distplat.strategies.task import Task


def load_task_class(entry: str, search_path: str) -> type[Task]:
    """
    Import `module:Class` from a folder or from what is installed.

    Raises:
        SpecError: no such module or class, or the class is no `Task`. What the module itself
            raises while it is imported passes through.
    """
    module_name, _, class_name = entry.partition(":")
    if search_path and search_path not in sys.path:
        sys.path.insert(0, search_path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the user's module exists; one that it imports does not
        there = [path.stem for path in Path(search_path or ".").glob("*.py")]
        near = hint(module_name, there) if there else "no Python file is there"
        message = f"could not import {module_name!r} from {search_path or 'the import path'}"
        raise SpecError(Problem(("task",), message, near)) from None
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, Task):
        return found
    tasks = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Task)]
    names = [name for name in tasks if name != "Task"]
    what = "has no class" if found is None else "has no subclass of distplat.Task called"
    message = f"module {module_name!r} {what} {class_name!r}"
    raise SpecError(Problem(("task",), message, hint(class_name, names)))
