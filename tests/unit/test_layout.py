"""The layout: who may import whom, what may load torch and Ray, how long a file is."""

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
"""Which folders a folder may import: cli -> actors -> strategies -> platform."""

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
def imported(path: Path) -> list[str]:
    """Dotted names of all that a file imports, in functions and for type checkers too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def folder_of(name: str) -> str | None:
    """The one of our folders from which a dotted name comes."""
    first, *rest = name.split(".")
    if first != "distplat" or not rest:
        return None
    home = distplat._MODULES.get(rest[0])
    return home.split(".")[1] if home else rest[0] if rest[0] in FOLDERS else None


OURS = sources(*FOLDERS)


def module_name(path: Path) -> str:
    """The dotted name of one of our files."""
    return ".".join(("distplat", *path.relative_to(ROOT).with_suffix("").parts))


MODULES = {module_name(path): path for path in OURS if path.name != "__init__.py"}


def needs(path: Path) -> set[str]:
    """Which of our modules a file imports: at its top, in functions and for type checkers."""
    found = set()
    for name in imported(path):
        holder = name.rpartition(".")[0]
        found |= {name} & MODULES.keys() or {holder} & MODULES.keys()
    return found


def test_imports_point_down() -> None:
    wrong = [
        f"{label(path)} imports {name}"
        for path in OURS
        for name in imported(path)
        if folder_of(name) not in {None, *ALLOWED[path.relative_to(ROOT).parts[0]]}
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "banned"),
    [("platform", {"ray", "torch"}), ("strategies", {"ray"}), ("cli", {"torch"})],
)
def test_what_a_folder_does_without(folder: str, banned: set[str]) -> None:
    wrong = [
        f"{label(path)} imports {name}"
        for path in sources(folder)
        for name in imported(path)
        if name.split(".")[0] in banned
    ]
    assert not wrong


def test_no_modules_need_each_other() -> None:
    """Nor in a ring of any length; a module can be read before those that import it."""
    TopologicalSorter({name: needs(path) for name, path in MODULES.items()}).prepare()


def test_the_tables_are_of_what_there_is() -> None:
    """A check over an empty list would pass."""
    assert "distplat.actors.controller" in needs(MODULES["distplat.actors.controller_actor"])
    assert "distplat.actors.in_process" in needs(
        MODULES["distplat.actors.trainer"]
    )  # in a function
    assert "distplat.cli.cluster" in needs(MODULES["distplat.cli.remote"])  # for type checkers
    assert all(sources(folder) for folder in FOLDERS)
    assert folder_of("distplat.Trainer") == "actors"
    assert folder_of("distplat.cli.main") == "cli"
    assert folder_of("distplat.__version__") is folder_of("numpy.random") is None


def test_no_folder_is_imported_by_its_bare_name() -> None:
    """It would be a second copy of every module; `platform` would be the standard library's."""
    bare = {"actors", "strategies", "cli"}
    wrong = [
        f"{label(path)} imports {name}"
        for path in sources("tests", "examples", "benchmarks", *FOLDERS)
        for name in imported(path)
        if name.split(".")[0] in bare
    ]
    assert not wrong


def run(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_driver_does_not_load_torch() -> None:
    names = [*LIGHT, *(module_name(path) for path in sources("platform"))]
    loads = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} loads torch')\n"
    )
    assert run(loads, ROOT) == ""


def test_the_package_itself_loads_nothing() -> None:
    ask = "import sys, distplat; print([m for m in ('ray', 'torch', 'numpy') if m in sys.modules])"
    assert run(ask, ROOT) == "[]"


def test_the_command_line_starts_without_ray() -> None:
    ask = "import sys, distplat.cli.main; print([m for m in ('ray', 'torch') if m in sys.modules])"
    assert run(ask, ROOT) == "[]"


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests", ROOT / "examples"], ids=label)
def test_platform_is_the_standard_librarys(folder: Path) -> None:
    ask = "import platform; print(platform.__file__, platform.python_implementation())"
    file, implementation = run(ask, folder).split()
    assert ROOT not in Path(file).parents or ".venv" in file
    assert implementation == sys.implementation.name.replace("cpython", "CPython")


@pytest.mark.parametrize("folder", ["platform", "tests/platform"])
def test_there_is_no_package_called_platform(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_links_lead_to_the_folders(folder: str) -> None:
    link = ROOT / "distplat" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder
    assert os.readlink(link) == f"../{folder}"  # relative: good in every clone


def test_files_and_functions_are_short() -> None:
    long = []
    for path in [*OURS, *sources("tests/support"), ROOT / "distplat/__init__.py"]:
        text = path.read_text()
        long += [label(path)] if len(text.splitlines()) > 500 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first, last = node.body[0], node.body[-1]  # a command's options are not its length
                size = (last.end_lineno or 0) - first.lineno
                long += [f"{label(path)}: {node.name}"] if size >= 50 else []
    assert not long


VAGUE = {"Give", "Gives", "Say", "Says", "Tell", "Tells", "Have", "Begin"}
"""Verbs for which there is a term: Return, Return whether, Notify, Ensure, Start."""


def test_docstrings_begin_with_the_terms_of_the_field() -> None:
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    vague = [
        f"{label(path)}: {text.splitlines()[0]}"
        for path in OURS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, documented) and (text := ast.get_docstring(node))
        if text.split()[0] in VAGUE
    ]
    assert not vague


@pytest.mark.parametrize("folder", ["unit", "cluster", "gpu", "support"])
def test_test_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / "tests" / folder / "__init__.py").exists()


def test_no_test_file_imports_another() -> None:
    """What two of them use is a module of `tests/support`, or one beside the cluster tests."""
    wrong = [
        f"{label(path)} imports {name}"
        for path in sources("tests")
        for name in imported(path)
        if name.startswith(("test_", "conftest"))
    ]
    assert not wrong


def test_test_modules_have_names_of_their_own() -> None:
    names = [path.stem for path in sources("tests") if path.stem != "conftest"]
    assert len(names) == len(set(names))
