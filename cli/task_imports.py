"""
Files that a task imports and a cluster does not get.

Ray leaves out what .gitignore and .rayignore list, distplat what may hold a key. A module of the
task among it would be missing on the cluster: an ImportError, minutes later. So the task's imports
are followed first. Modules are read, not run.
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
        SpecError: names the files, who imports them, and why they stay.
    """
    problems = []
    for item in unshipped_imports(task, package.folder, package.paths):
        name, importer = (path.relative_to(package.folder) for path in (item.path, item.importer))
        who = "the task" if item.path == item.importer else f"{importer}:{item.line}"
        message = f"{name}, which {who} imports, is not shipped to the cluster"
        excluded = [part for part in name.parts if in_excludes(part)]
        hint = "a .gitignore, a .rayignore or `excludes` lists it: take it off, or move the file"
        if excluded:
            hint = f"{excluded[0]} is never shipped: such names hold keys, or runs; rename it"
        problems.append(Problem(("--working-dir",), message, hint))
    if problems:
        raise SpecError(*problems)


@dataclass(frozen=True)
class UnshippedImport:
    """A file that is imported and not shipped."""

    path: Path
    importer: Path
    """The file that imports it; the same one: it is the task's own."""
    line: int
    """Line of the import, from 1."""


def unshipped_imports(
    task: str, folder: Path, shipped: Collection[Path]
) -> Iterator[UnshippedImport]:
    """
    Go from a task's module through all that it imports from its own folder.

    An import that may fail (`try: ... except ImportError`), or that only a type checker reads, asks
    for nothing.

    Args:
        task: `module:Class`, or a script.
        folder: of the user's; where modules are looked for.
        shipped: files below it that travel.

    Yields:
        Each file that does not travel, once.
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
    """Give the files that an import of `a.b.c` runs, of those below the folder."""
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
    """Give the modules that a file imports, and the lines; a name may be one, or an attribute."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # the check of the task tells of it
        return
    package = path.relative_to(folder).parent.parts
    for node in _executed_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base, node.lineno
            names = [alias.name for alias in node.names if alias.name != "*"]
            yield from ((f"{base}.{name}" if base else name, node.lineno) for name in names)


def _executed_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Go through a tree, but not through what may fail or is never run."""
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
