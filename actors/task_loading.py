"""Find the user's task, and tell the user's errors from ours."""

import importlib
import sys
import traceback
from pathlib import Path
from types import TracebackType

import distplat
from distplat.platform.errors import Problem, SpecError, UserCodeError
from distplat.platform.suggest import hint
from distplat.strategies.task import Task

_OURS = [
    (Path(distplat.__file__).parent / part).resolve()
    for part in ("platform", "strategies", "actors")
]
"""Where our code lies: behind the links of a clone, or in the package itself once installed."""


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
        near = hint(module_name, [path.stem for path in Path(search_path or ".").glob("*.py")])
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


def as_user_error(error: BaseException, rank: int, step: int | None) -> UserCodeError:
    """Wrap what user code raised, with the traceback from the first frame that is the user's."""
    frame: TracebackType | None = error.__traceback__
    while frame is not None and _is_ours(frame.tb_frame.f_code.co_filename):
        frame = frame.tb_next
    lines = traceback.format_exception(type(error), error, frame)
    summary = traceback.format_exception_only(error)[-1].strip()
    return UserCodeError(rank, step, summary, "".join(lines))


def _is_ours(filename: str) -> bool:
    path = Path(filename).resolve()
    ours = any(path.is_relative_to(folder) for folder in _OURS)
    return ours or filename.startswith("<frozen importlib") or "/importlib/" in filename
