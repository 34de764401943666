"""The package layout: allowed imports, modules without torch or Ray, sizes of files."""

import ast
import os
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import distplat

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("platform", "strategies", "actors", "cli")

ALLOWED = {
    "platform": {"platform"},
    "strategies": {"strategies", "platform"},
    "actors": {"actors", "strategies", "platform"},
    "cli": {"cli", "actors", "strategies", "platform"},
}
"""The folders that each folder may import: cli -> actors -> strategies -> platform."""

LIGHT = [
    "distplat.platform.run_directory",
    "distplat.strategy",
    "distplat.strategies.catalog",
    "distplat.strategies.strategy_spec",
    "distplat.strategies.hybrid",
    "distplat.strategies.pipeline.hybrid_options",
    "distplat.strategies.ps_async",
    "distplat.strategies.ps_sync",
    "distplat.strategies.ring",
    "distplat.strategies.task",
    "distplat.strategies.sparse.files",
    "distplat.strategies.algorithms.partition",
    "distplat.strategies.algorithms.pipeline_schedule",
    "distplat.strategies.algorithms.simulate",
    "distplat.strategies.algorithms.gantt",
    "distplat.cli.main",
    "distplat.cli.remote",
    "distplat.cli.submit",
    "distplat.cli.report_page",
    "distplat.strategies.tensor.parallel_plan",
    "distplat.actors.controller",
    "distplat.actors.controller_actor",
    "distplat.actors.controller_client",
    "distplat.actors.actor_group",
    "distplat.actors.launch",
    "distplat.actors.messages",
    "distplat.actors.servers.node",
    "distplat.actors.spawn",
    "distplat.actors.stopping",
    "distplat.actors.trainer",
    "distplat.actors.worker",
]
"""Modules of the driver and of light actors: importing them must not load torch."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imported_names(path: Path) -> list[str]:
    """Return the dotted names that a file imports, also in functions and for type checkers."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def folder_of(name: str) -> str | None:
    """Return the folder of this repository that defines a dotted name."""
    first, *rest = name.split(".")
    if first != "distplat" or not rest:
        return None
    module_path = distplat._MODULES.get(rest[0])
    return module_path.split(".")[1] if module_path else rest[0] if rest[0] in FOLDERS else None


SOURCES = sources(*FOLDERS)


def module_name(path: Path) -> str:
    """Return the dotted name of a file."""
    return ".".join(("distplat", *path.relative_to(ROOT).with_suffix("").parts))


MODULES = {module_name(path): path for path in SOURCES if path.name != "__init__.py"}


def imported_modules(path: Path) -> set[str]:
    """Return the modules of this repository that a file imports, anywhere in the file."""
    modules = set()
    for name in imported_names(path):
        parent = name.rpartition(".")[0]
        modules |= {name} & MODULES.keys() or {parent} & MODULES.keys()
    return modules


def test_imports_point_down() -> None:
    violations = [
        f"{label(path)} imports {name}"
        for path in SOURCES
        for name in imported_names(path)
        if folder_of(name) not in {None, *ALLOWED[path.relative_to(ROOT).parts[0]]}
    ]
    assert not violations


@pytest.mark.parametrize(
    ("folder", "banned"),
    [("platform", {"ray", "torch"}), ("strategies", {"ray"}), ("cli", {"torch"})],
)
def test_folder_does_not_import_banned_packages(folder: str, banned: set[str]) -> None:
    violations = [
        f"{label(path)} imports {name}"
        for path in sources(folder)
        for name in imported_names(path)
        if name.split(".")[0] in banned
    ]
    assert not violations


def test_no_import_cycles() -> None:
    """A cycle of any length is found."""
    TopologicalSorter({name: imported_modules(path) for name, path in MODULES.items()}).prepare()


def test_import_analysis_finds_known_imports() -> None:
    """A check over an empty list would pass."""
    assert "distplat.actors.controller" in imported_modules(
        MODULES["distplat.actors.controller_actor"]
    )
    # in a function
    assert "distplat.actors.in_process" in imported_modules(MODULES["distplat.actors.trainer"])
    # for type checkers
    assert "distplat.cli.cluster" in imported_modules(MODULES["distplat.cli.remote"])
    assert all(sources(folder) for folder in FOLDERS)
    assert folder_of("distplat.Trainer") == "actors"
    assert folder_of("distplat.cli.main") == "cli"
    assert folder_of("distplat.__version__") is folder_of("numpy.random") is None


def test_no_folder_is_imported_by_its_bare_name() -> None:
    """It would load a second copy of every module, and the standard library's `platform`."""
    bare = {"actors", "strategies", "cli"}
    violations = [
        f"{label(path)} imports {name}"
        for path in sources("tests", "examples", "benchmarks", *FOLDERS)
        for name in imported_names(path)
        if name.split(".")[0] in bare
    ]
    assert not violations


def run(code: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_light_modules_do_not_load_torch() -> None:
    names = [*LIGHT, *(module_name(path) for path in sources("platform"))]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} loads torch')\n"
    )
    assert run(code, ROOT) == ""


def test_package_import_is_light() -> None:
    code = "import sys, distplat; print([m for m in ('ray', 'torch', 'numpy') if m in sys.modules])"
    assert run(code, ROOT) == "[]"


def test_command_line_does_not_load_ray() -> None:
    code = "import sys, distplat.cli.main; print([m for m in ('ray', 'torch') if m in sys.modules])"
    assert run(code, ROOT) == "[]"


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests", ROOT / "examples"], ids=label)
def test_platform_module_is_the_standard_librarys(folder: Path) -> None:
    code = "import platform; print(platform.__file__, platform.python_implementation())"
    file, implementation = run(code, folder).split()
    assert ROOT not in Path(file).parents or ".venv" in file
    assert implementation == sys.implementation.name.replace("cpython", "CPython")


@pytest.mark.parametrize("folder", ["platform", "tests/platform"])
def test_platform_folders_have_no_init(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_point_to_the_folders(folder: str) -> None:
    link = ROOT / "distplat" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder
    assert os.readlink(link) == f"../{folder}"  # relative, for every clone


def test_files_and_functions_are_short() -> None:
    long = []
    for path in [*SOURCES, *sources("tests/support"), ROOT / "distplat/__init__.py"]:
        text = path.read_text()
        long += [label(path)] if len(text.splitlines()) > 500 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first, last = node.body[0], node.body[-1]  # excludes the signature with its options
                size = (last.end_lineno or 0) - first.lineno
                long += [f"{label(path)}: {node.name}"] if size >= 50 else []
    assert not long


VAGUE = {"Give", "Gives", "Say", "Says", "Tell", "Tells", "Have", "Begin"}
"""Verbs with a standard term: Return, Return whether, Notify, Ensure, Start."""


def test_docstrings_start_with_standard_verbs() -> None:
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    vague = [
        f"{label(path)}: {text.splitlines()[0]}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, documented) and (text := ast.get_docstring(node))
        if text.split()[0] in VAGUE
    ]
    assert not vague


@pytest.mark.parametrize("folder", ["unit", "cluster", "gpu", "support"])
def test_test_folders_are_not_packages(folder: str) -> None:
    assert not (ROOT / "tests" / folder / "__init__.py").exists()


def test_test_files_do_not_import_each_other() -> None:
    """Shared code is a module of `tests/support`, or one next to the cluster tests."""
    violations = [
        f"{label(path)} imports {name}"
        for path in sources("tests")
        for name in imported_names(path)
        if name.startswith(("test_", "conftest"))
    ]
    assert not violations


def test_names_of_test_modules_are_unique() -> None:
    names = [path.stem for path in sources("tests") if path.stem != "conftest"]
    assert len(names) == len(set(names))
