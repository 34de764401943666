"""
Files that a task imports from the user's folder, and that are not shipped with it.

Ray leaves out what .gitignore and .rayignore list, distplat what may hold a key. A module among it
would be missing on the cluster: an ImportError, minutes later. Modules are read, not run.
"""

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LeftOut:
    """A file that is imported and not shipped."""

    path: Path
    importer: Path
    """The file that imports it; the same one: it is the task's own."""
    line: int
    """Of the import, from 1."""


def left_out(task: str, folder: Path, shipped: Collection[Path]) -> Iterator[LeftOut]:
    """
    Go from a task's module through all that it imports from its own folder.

    An import that may fail (`try: ... except ImportError`), or that only a type checker reads, asks
    for nothing.

    Args:
        task: `module:Class`.
        folder: of the user's; where modules are looked for.
        shipped: files below it that travel.

    Yields:
        Each file that does not travel, once.
    """
    module = task.partition(":")[0]
    waiting = [(path, path, 1) for path in _files(folder, module)]
    seen: set[Path] = set()
    while waiting:
        path, importer, line = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if path not in shipped:
            yield LeftOut(path, importer, line)
            continue
        for name, at in _imported(path, folder):
            waiting += [(found, path, at) for found in _files(folder, name)]


def _files(folder: Path, module: str) -> list[Path]:
    """Give the files that an import of `a.b.c` runs, of those below the folder."""
    found, place = [], folder
    for part in module.split("."):
        package, file = place / part / "__init__.py", place / f"{part}.py"
        if package.is_file():
            found.append(package)
        elif file.is_file():
            return [*found, file]
        place /= part
        if not place.is_dir():
            break
    return found


def _imported(path: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """Give the modules that a file imports, and the lines; a name may be one, or an attribute."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # the check of the task tells of it
        return
    package = path.relative_to(folder).parent.parts
    for node in _needed(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base, node.lineno
            names = [alias.name for alias in node.names if alias.name != "*"]
            yield from ((f"{base}.{name}" if base else name, node.lineno) for name in names)


def _needed(node: ast.AST) -> Iterator[ast.AST]:
    """Go through a tree, but not through what may fail or is never run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Try) and any(map(_catches_import_errors, child.handlers)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _needed(child)


def _catches_import_errors(handler: ast.ExceptHandler) -> bool:
    caught = "Exception" if handler.type is None else ast.unparse(handler.type)
    return any(name in caught for name in ("ImportError", "ModuleNotFoundError", "Exception"))
