"""Import the user's task, train function or script."""

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
"""A training loop of the user; see `call_train_function`."""
SHIPPED = "_ray_pkg_"
"""Prefix of folders that Ray has shipped to a node."""


def load_task_class(entry: str, search_path: str) -> type[Task]:
    """
    Import `module:Class` from a folder or from installed packages.

    Exceptions of the module's own code pass unchanged.

    Raises:
        SpecError: the module or class does not exist, or the class is not a `Task`.
    """
    module, name = _import_module(entry, search_path)
    attribute = getattr(module, name, None)
    if isinstance(attribute, type) and issubclass(attribute, Task):
        return attribute
    if callable(attribute) and not isinstance(attribute, type):
        text = f"{entry} is a function, and the job has the fields of a task"
        hint = (
            "remove optimizer, global_batch_size, epochs and steps: a train function sets its own"
        )
        raise SpecError(Problem(("task",), text, hint))
    tasks = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Task) and name != "Task"
    ]
    problem = "has no class" if attribute is None else "has no subclass of distplat.Task called"
    raise _not_found(module, problem, name, tasks)


def load_train_function(entry: str, search_path: str) -> TrainFunction:
    """
    Import `module:function` like `load_task_class`, or return a function that runs a script.

    Raises:
        SpecError: the module, function or script does not exist; or the entry is a `Task`, which
            needs more fields in the job.
    """
    if script_of(entry):
        return _script_function(entry, search_path)
    module, name = _import_module(entry, search_path)
    attribute = getattr(module, name, None)
    if isinstance(attribute, type) and issubclass(attribute, Task):
        raise SpecError(
            *(
                Problem((field,), f"required, but missing: {entry} is a Task")
                for field in ("optimizer", "global_batch_size")
            ),
            Problem(("epochs",), "give `epochs` or `steps`, got neither"),
        )
    if callable(attribute) and not isinstance(attribute, type):
        return cast(TrainFunction, attribute)
    functions = [name for name, value in vars(module).items() if isinstance(value, FunctionType)]
    problem = "has no function" if attribute is None else "has no function called"
    raise _not_found(module, problem, name, functions)


def needed_arguments(function: TrainFunction) -> list[inspect.Parameter]:
    """Return the parameters of a function without a default."""
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.default is p.empty and p.kind not in _VARIADIC]


def takes_names(function: TrainFunction, names: Collection[str]) -> bool:
    """
    Return whether to pass `task_args` to a function as keyword arguments.

    This holds if it cannot take a single dict, or if its parameters match the names.

    Args:
        function: the train function.
        names: names in `task_args`.
    """
    required = needed_arguments(function)
    if len(required) > 1 or any(p.kind is p.KEYWORD_ONLY for p in required):
        return True
    parameters = inspect.signature(function).parameters.values()
    if parameters and all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters):
        return True
    return bool(names) and ({p.name for p in required} <= {*names} <= {p.name for p in parameters})


def call_train_function(function: TrainFunction, config: Mapping[str, Any]) -> None:
    """Call a train function with `task_args` as one dict, as keywords, or without arguments."""
    if takes_names(function, config):
        function(**config)
    elif inspect.signature(function).parameters:
        function(dict(config))
    else:
        function()


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _not_found(module: ModuleType, problem: str, name: str, known: list[str]) -> SpecError:
    message = f"module {getattr(module, '__name__', module)!r} {problem} {name!r}"
    return SpecError(Problem(("task",), message, hint_of(name, known)))


def _import_module(entry: str, search_path: str) -> tuple[ModuleType, str]:
    """Import the module of an entry point; return it and the name of the attribute."""
    module_name, _, name = entry.partition(":")
    folder = Path(search_path or ".")
    if search_path:
        _prepend_to_path(search_path)
    if (path := _file_of(module_name, folder)) is not None:
        _check_imports(module_name, path, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module exists, but one of its imports does not
        file_names = [path.stem for path in Path(search_path or ".").glob("*.py")]
        advice = (
            hint_of(module_name, file_names) if file_names else "the folder has no Python files"
        )
        message = f"could not import {module_name!r} from {search_path or 'the import path'}"
        raise SpecError(Problem(("task",), message, advice)) from None
    if isinstance(module, ModuleType):  # a module may replace itself in `sys.modules`
        _check_location(module, folder)
    return module, name


def _prepend_to_path(folder: str) -> None:
    """Put a folder first on the import path, before PYTHONPATH."""
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]


def _check_imports(name: str, path: Path, folder: Path) -> None:
    """
    Raise if a file imports a module of its folder while another module of that name is loaded.

    The loaded module may be an earlier job's. Names of the standard library are not checked,
    because Python imports many of its modules at startup.

    Args:
        name: name of the file's module.
        path: path of the file.
        folder: folder of the modules; imports are followed through its files.

    Raises:
        SpecError: see `_check_location`.
    """
    shadowing = _shadowing_modules(folder)
    queue, seen = [(name, path)] if shadowing else [], {path}
    while queue:
        for imported in _names_imported(*queue.pop()):
            file = _file_of(imported, folder)
            if file is None or file in seen or imported.split(".")[0] in sys.stdlib_module_names:
                continue
            seen.add(file)
            queue.append((imported, file))
            if imported in shadowing:
                _check_location(shadowing[imported], folder)


def _shadowing_modules(folder: Path) -> dict[str, ModuleType]:
    """
    Return loaded modules that shadow modules of a folder, by name.

    `distplat` and `__main__` are excluded. The result is usually empty, so that no file has to be
    parsed, which would take half a minute for a large library.
    """
    folder_names: set[str] = set()
    with suppress(OSError):
        folder_names = {entry.name.partition(".")[0] for entry in folder.iterdir()}
    folder_names -= {*sys.stdlib_module_names, "distplat", "__main__"}
    return {
        name: module
        for name, module in sys.modules.copy().items()  # a copy, because other threads may import
        if name.partition(".")[0] in folder_names
        and isinstance(module, ModuleType)
        and _shadowed_file(module, folder) is not None
    }


def _names_imported(name: str, path: Path) -> set[str]:
    """
    Return the full names of all modules, and their packages, that a module's file may import.

    They are read from bytecode and not from `ast`: until 3.11.7, CPython can build syntax trees in
    one thread at a time only, and other threads build some when they format a traceback.
    """
    try:
        code = SourceFileLoader(name, str(path)).get_code(name)
    except (OSError, SyntaxError, ValueError):
        return set()  # the import itself raises the error
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names_found = set()
    for level, base, names in _imports_in(code) if code is not None else ():
        with suppress(ImportError):  # more dots than parent packages
            base = resolve_name("." * level + base, package)
            names_found |= {base, *(f"{base}.{dotted}" for dotted in names)}
    parts = [dotted.split(".") for dotted in names_found]
    return {".".join(dotted[:end]) for dotted in parts for end in range(1, len(dotted) + 1)}


def _imports_in(code: CodeType) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Yield the imports of a code object: level, module, and names imported from the module."""
    arguments: deque[Any] = deque(maxlen=2)
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            level, names = arguments
            yield level, instruction.argval, names or ()
        if instruction.opname != "EXTENDED_ARG":
            arguments.append(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _imports_in(constant)


def _file_of(module: str, folder: Path) -> Path | None:
    """Return the file of a module in a folder, or None."""
    path = folder.joinpath(*module.split("."))
    files = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
    return files[0] if files else None


def _check_location(module: ModuleType, folder: Path) -> None:
    """
    Check that a loaded module is the one of a folder.

    Raises:
        SpecError: the module is another one, such as the standard library's or an earlier job's.
    """
    if (file := _shadowed_file(module, folder)) is not None:
        origin = getattr(module, "__file__", None)
        source = "is built into Python" if origin is None else f"was imported before, from {origin}"
        text = f"{file} would not be used: a module {module.__name__!r} {source}"
        hint = "rename the file, or run the job in a new process"
        raise SpecError(Problem(("task",), text, hint))


def _shadowed_file(module: ModuleType, folder: Path) -> Path | None:
    """Return the file of a folder that a loaded module shadows, or None."""
    file = _file_of(module.__name__, folder)
    origin = getattr(module, "__file__", None)
    if file is None or (origin and _is_loaded_from(Path(origin), file)):
        return None
    return file


def _is_loaded_from(loaded: Path, path: Path) -> bool:
    """Return whether a module's file is at a path, or compiled beside it, as by Cython."""
    pairs = (loaded, path), (loaded.parent, path.parent)
    same_file = any(first.exists() and first.samefile(second) for first, second in pairs)
    return same_file or (_is_shipped(loaded) and not _is_shipped(path) and _are_equal(loaded, path))


def _is_shipped(path: Path) -> bool:
    """Return whether Ray has shipped a file; on the driver's node the original exists, too."""
    return any(part.startswith(SHIPPED) for part in path.parts)


def _are_equal(first: Path, second: Path) -> bool:
    try:
        return first.read_bytes() == second.read_bytes()
    except OSError:
        return False


def _script_function(entry: str, search_path: str) -> Callable[[], None]:
    """
    Return a function that runs a script in this process like `python train.py --lr 0.1`.

    The script runs as `__main__`, with its command line, and its folder first on the import path.
    The function returns if the script exits with code 0.

    Args:
        entry: `task` of the job, which is a script by `script_of`.
        search_path: folder of the script.

    Raises:
        SpecError: the file does not exist.
        SyntaxError: the file is not valid Python.
    """
    name, *arguments = script_of(entry)
    path = (Path(search_path or ".") / name).resolve()
    if not path.is_file():
        scripts = [file.name for file in path.parent.glob("*.py")]
        text = f"there is no script {name!r} in {search_path or 'the current directory'}"
        raise SpecError(Problem(("task",), text, hint_of(path.name, scripts) if scripts else ""))
    compile(path.read_bytes(), str(path), "exec")
    _check_imports("__main__", path, path.parent)

    def script() -> None:
        saved_argv = sys.argv
        sys.argv = [str(path), *arguments]
        _prepend_to_path(str(path.parent))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as error:
            if error.code not in (None, 0):
                raise
        finally:
            sys.argv = saved_argv

    return script
