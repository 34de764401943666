"""Find the user's task, train function or script."""

import dis
import importlib
import inspect
import runpy
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.util import resolve_name
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias, cast

from distplat.platform.errors import Problem, SpecError
from distplat.platform.errors import hint as hint_of
from distplat.platform.own_loop import script_of
from distplat.strategies.task import Task

TrainFunction: TypeAlias = Callable[..., object]
"""A loop of the user's own; see `call_train_function`."""
SHIPPED = "_ray_pkg_"
"""Names of folders that Ray has brought to a node begin so."""


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
    what = "has no class" if found is None else "has no subclass of distplat.Task called"
    raise _nothing(module, what, name, [one for one in tasks if one != "Task"])


def load_train_function(entry: str, search_path: str) -> TrainFunction:
    """
    Import `module:function`, see `load_task_class`, or give what runs a script.

    Raises:
        SpecError: no such module, function or script; or it is a `Task`, whose job needs more
            fields.
    """
    if script_of(entry):
        return _script_function(entry, search_path)
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
    raise _nothing(module, what, name, there)


def needed_arguments(function: TrainFunction) -> list[inspect.Parameter]:
    """Give the parameters of a function that have no default."""
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.default is p.empty and p.kind not in _OPEN]


def takes_names(function: TrainFunction, given: Collection[str]) -> bool:
    """
    Say whether a function takes `task_args` one by one.

    It does if it has no place for one dict, or if these names are those of its arguments.

    Args:
        function: of the user's.
        given: names in `task_args`.
    """
    needed = needed_arguments(function)
    parameters = inspect.signature(function).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    only_names = bool(by_name) and len(by_name) == len(parameters)
    meant = bool(given) and {p.name for p in needed} <= {*given} <= {p.name for p in parameters}
    return len(needed) > 1 or any(p.kind is p.KEYWORD_ONLY for p in needed) or only_names or meant


def call_train_function(function: TrainFunction, config: Mapping[str, Any]) -> None:
    """Call a train function with `task_args`: as one dict, or by name, or not where it has none."""
    if takes_names(function, config):
        function(**config)
    elif inspect.signature(function).parameters:
        function(dict(config))
    else:
        function()


_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _nothing(module: ModuleType, what: str, name: str, there: list[str]) -> SpecError:
    message = f"module {getattr(module, '__name__', module)!r} {what} {name!r}"
    return SpecError(Problem(("task",), message, hint_of(name, there)))


def _imported(entry: str, search_path: str) -> tuple[ModuleType, str]:
    """Import the module of an entry point; give it, and the name to look for in it."""
    module_name, _, name = entry.partition(":")
    folder = Path(search_path or ".")
    if search_path:
        _import_from(search_path)
    if (path := _file_of(module_name, folder)) is not None:
        _check_imports(module_name, path, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the user's module exists; one that it imports does not
        there = [path.stem for path in Path(search_path or ".").glob("*.py")]
        near = hint_of(module_name, there) if there else "no Python file is there"
        message = f"could not import {module_name!r} from {search_path or 'the import path'}"
        raise SpecError(Problem(("task",), message, near)) from None
    if isinstance(module, ModuleType):  # it may have put another object in its place
        _check_location(module, folder)
    return module, name


def _import_from(folder: str) -> None:
    """Have modules of a folder come first, before those of these names that PYTHONPATH has."""
    sys.path[:] = [folder, *(one for one in sys.path if one != folder)]


def _check_imports(name: str, path: Path, folder: Path) -> None:
    """
    Refuse a file that imports a module of its folder of which another is here: an earlier job's.

    Of the standard library's names Python has many itself when it starts; there its rules hold.

    Args:
        name: of the module that the file is.
        path: of the file.
        folder: files of its own that are imported one by another are looked at.

    Raises:
        SpecError: see `_check_location`.
    """
    others = _others_here(folder)
    left, seen = [(name, path)] if others else [], {path}
    while left:
        for found in _names_imported(*left.pop()):
            there = _file_of(found, folder)
            if there is None or there in seen or found.split(".")[0] in sys.stdlib_module_names:
                continue
            seen.add(there)
            left.append((found, there))
            if found in others:
                _check_location(others[found], folder)


def _others_here(folder: Path) -> dict[str, ModuleType]:
    """
    Give the modules that are here in place of a folder's own, by name.

    Ours is everybody's, and `__main__` is what runs. Mostly there are none, and no file need be
    read: of a large library that takes half a minute.
    """
    own: set[str] = set()
    with suppress(OSError):
        own = {one.name.partition(".")[0] for one in folder.iterdir()}
    own -= {*sys.stdlib_module_names, "distplat", "__main__"}
    return {
        name: module
        for name, module in sys.modules.copy().items()  # at once: other threads import, too
        if name.partition(".")[0] in own
        and isinstance(module, ModuleType)
        and _unused_because_of(module, folder) is not None
    }


def _names_imported(name: str, path: Path) -> set[str]:
    """
    Give all modules that a module's file may import by their full names, and their packages.

    Its code says so. Trees of `ast` would, too; until 3.11.7 CPython builds them in one thread at a
    time only, and others build some whenever they show a traceback.
    """
    try:
        code = SourceFileLoader(name, str(path)).get_code(name)
    except (OSError, SyntaxError, ValueError):
        return set()  # who imports it hears of that
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for level, base, names in _imports_in(code) if code is not None else ():
        with suppress(ImportError):  # more dots than packages
            base = resolve_name("." * level + base, package)
            found |= {base, *(f"{base}.{one}" for one in names)}
    parts = [one.split(".") for one in found]
    return {".".join(one[:end]) for one in parts for end in range(1, len(one) + 1)}


def _imports_in(code: CodeType) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Give the imports of a piece of code: dots, name, and what comes `from` there."""
    before: deque[Any] = deque(maxlen=2)
    for one in dis.get_instructions(code):
        if one.opname == "IMPORT_NAME":
            level, names = before
            yield level, one.argval, names or ()
        if one.opname != "EXTENDED_ARG":
            before.append(one.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _imports_in(inner)


def _file_of(module: str, folder: Path) -> Path | None:
    """Give the file of a folder that a module comes from; None: it has none."""
    path = folder.joinpath(*module.split("."))
    there = [one for one in (path / "__init__.py", path.with_suffix(".py")) if one.is_file()]
    return there[0] if there else None


def _check_location(module: ModuleType, folder: Path) -> None:
    """
    Refuse a module that is not the one of the folder: what is imported already comes first.

    Raises:
        SpecError: it is another one, such as the standard library's or another run's.
    """
    if (there := _unused_because_of(module, folder)) is not None:
        loaded = getattr(module, "__file__", None)
        where = "is built into Python" if loaded is None else f"was imported before, from {loaded}"
        text = f"{there} would not be used: a module {module.__name__!r} {where}"
        hint = "rename the file, or run it in a process of its own"
        raise SpecError(Problem(("task",), text, hint))


def _unused_because_of(module: ModuleType, folder: Path) -> Path | None:
    """Give the file of a folder that a module was not loaded from; None: it has none, or was."""
    there = _file_of(module.__name__, folder)
    loaded = getattr(module, "__file__", None)
    if there is None or (loaded and _is_at(Path(loaded), there)):
        return None
    return there


def _is_at(loaded: Path, path: Path) -> bool:
    """Say whether a file is that of a path, or compiled from it and beside it, as by Cython."""
    pairs = (loaded, path), (loaded.parent, path.parent)
    at = any(one.exists() and one.samefile(other) for one, other in pairs)
    return at or (_is_shipped(loaded) and not _is_shipped(path) and _are_equal(loaded, path))


def _is_shipped(path: Path) -> bool:
    """Say whether Ray has brought a file here; beside the driver its original is here as well."""
    return any(part.startswith(SHIPPED) for part in path.parts)


def _are_equal(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError:
        return False


def _script_function(entry: str, search_path: str) -> Callable[[], None]:
    """
    Give a function that runs a script as `python train.py --lr 0.1` does, in the worker's process.

    The script is `__main__`, with its command line and its folder in front of the import path. One
    that exits with code 0 returns.

    Args:
        entry: of the job; `script_of` knows it for a script.
        search_path: folder where it lies.

    Raises:
        SpecError: there is no such file.
        SyntaxError: it is no Python.
    """
    name, *words = script_of(entry)
    path = (Path(search_path or ".") / name).resolve()
    if not path.is_file():
        there = [one.name for one in path.parent.glob("*.py")]
        text = f"there is no script {name!r} in {search_path or 'the current directory'}"
        raise SpecError(Problem(("task",), text, hint_of(path.name, there) if there else ""))
    compile(path.read_bytes(), str(path), "exec")
    _check_imports("__main__", path, path.parent)

    def script() -> None:
        before = sys.argv
        sys.argv = [str(path), *words]
        _import_from(str(path.parent))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise
        finally:
            sys.argv = before

    return script
