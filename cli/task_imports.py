"""
Find files that a task imports but that are not uploaded to the cluster.

Ray excludes files listed in .gitignore and .rayignore, and distplat excludes files that may hold
keys. If an excluded file is a module of the task, the job fails with an ImportError minutes later.
So the task's imports are checked before the upload. Modules are parsed, not executed.
"""

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from distplat.cli.package import Package, in_excludes
from distplat.platform.errors import Problem, SpecError
from distplat.platform.own_loop import script_of


def check_imports(task: str, package: Package) -> None:
    """
    Refuse a folder whose task imports files that are not shipped with it.

    Raises:
        SpecError: names the missing files, the imports, and the rules that exclude the files.
    """
    problems = []
    for item in unshipped_imports(task, package.folder, package.paths):
        name, importer = (path.relative_to(package.folder) for path in (item.path, item.importer))
        source = "the task" if item.path == item.importer else f"{importer}:{item.line}"
        message = f"{name}, which {source} imports, is not shipped to the cluster"
        excluded = [part for part in name.parts if in_excludes(part)]
        hint = "a .gitignore, a .rayignore or `excludes` lists it: take it off, or move the file"
        if excluded:
            hint = f"{excluded[0]} is never shipped: such names hold keys, or runs; rename it"
        problems.append(Problem(("--working-dir",), message, hint))
    if problems:
        raise SpecError(*problems)


@dataclass(frozen=True)
class UnshippedImport:
    """A file that is imported but not uploaded."""

    path: Path
    importer: Path
    """File with the import; equal to `path` for the task's own module."""
    line: int
    """Line of the import, starting at 1."""


def unshipped_imports(
    task: str, folder: Path, shipped: Collection[Path]
) -> Iterator[UnshippedImport]:
    """
    Follow the imports of a task's module within its folder.

    Imports that may fail (`try: ... except ImportError`) and imports for type checkers are ignored.

    Args:
        task: `module:Class`, or a script.
        folder: the user's folder, in which modules are searched.
        shipped: files of the folder that are uploaded.

    Yields:
        Each file that is not uploaded, once.
    """
    module = task.partition(":")[0]
    if script := script_of(task):
        path = folder / script[0]
        folder, module = path.parent, path.stem
    waiting = [(path, path, 1) for path in _module_files(folder, module)]
    seen: set[Path] = set()
    while waiting:
        path, importer, line = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if path not in shipped:
            yield UnshippedImport(path, importer, line)
            continue
        for name, at in _imports_of(path, folder):
            waiting += [(file, path, at) for file in _module_files(folder, name)]


def _module_files(folder: Path, module: str) -> list[Path]:
    """Return the files below the folder that an import of `a.b.c` executes."""
    files, parent = [], folder
    for part in module.split("."):
        package, file = parent / part / "__init__.py", parent / f"{part}.py"
        if package.is_file():
            files.append(package)
        elif file.is_file():
            return [*files, file]
        parent /= part
        if not parent.is_dir():
            break
    return files


def _imports_of(path: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the modules that a file imports, with lines; `from` names may also be attributes."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # the task check reports the error
        return
    package = path.relative_to(folder).parent.parts
    for node in _executed_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            if base:
                yield base, node.lineno
            names = [alias.name for alias in node.names if alias.name != "*"]
            yield from ((f"{base}.{name}" if base else name, node.lineno) for name in names)


def _executed_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a syntax tree, except for blocks that may fail or are never executed."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Try) and any(map(_catches_import_errors, child.handlers)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _executed_nodes(child)


def _catches_import_errors(handler: ast.ExceptHandler) -> bool:
    caught = "Exception" if handler.type is None else ast.unparse(handler.type)
    return any(name in caught for name in ("ImportError", "ModuleNotFoundError", "Exception"))
