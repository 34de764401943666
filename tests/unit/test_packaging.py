"""The package as users get it: a wheel, an editable install, a clone without installation."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("distplat", "platform", "strategies", "actors", "cli", "pyproject.toml", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

CHECK_IMPORTS = """
import site, sys
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[1])  # an editable install is a .pth file there
import platform
import distplat.actors, distplat.cli, distplat.strategies
import distplat.platform.errors, distplat.platform.even_split
from distplat.actors.user_errors import _is_internal
assert platform.python_implementation(), platform
assert "distplat" not in platform.__file__, platform.__file__
assert _is_internal(distplat.platform.errors.__file__), "own frames would be taken for the user's"
assert not _is_internal(sys.argv[1] + "/model.py")
from importlib.resources import files
assert files("distplat.cli").joinpath("report.html.j2").is_file()
print(distplat.platform.errors.__file__)
"""

pytestmark = pytest.mark.packaging


def run(command: list[str], cwd: Path) -> str:
    process = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=100)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.strip()


def imports_from(folder: Path, cwd: Path) -> Path:
    """Return the module's path in an interpreter with this folder instead of site-packages."""
    return Path(run([sys.executable, "-S", "-c", CHECK_IMPORTS, str(folder)], cwd))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the source with its links, so that builds do not write into the repository."""
    folder = tmp_path_factory.mktemp("packaging") / "clone"
    folder.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / part, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, folder / part)
    (folder / "README.md").write_text("# A copy for a test\n")
    return folder


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_import_from_a_clone(clone: Path, tmp_path: Path, inside: bool) -> None:
    found = imports_from(clone, cwd=clone if inside else tmp_path)
    assert found == clone / "distplat/platform/errors.py"


def test_import_from_a_wheel(clone: Path, tmp_path: Path) -> None:
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    run([*PIP, *build, str(clone)], cwd=tmp_path)
    (wheel,) = tmp_path.glob("distplat-*.whl")
    site = tmp_path / "site"
    run([*PIP, "install", "--no-deps", "--target", str(site), str(wheel)], cwd=tmp_path)
    assert imports_from(site, cwd=tmp_path) == site / "distplat/platform/errors.py"
    missing = [
        path
        for folder in PARTS[1:5]
        for path in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.j2"))
        if not (site / "distplat" / path.relative_to(ROOT)).exists()
    ]
    assert not missing
    assert (site / "distplat/py.typed").exists()
    assert (site / "distplat/cli/report.html.j2").exists()
    others = {path.name for path in site.iterdir() if not path.name.startswith("distplat-")}
    assert others - {"bin", "__pycache__"} == {"distplat"}  # no top-level `platform` or `cli`


def test_import_from_an_editable_install(clone: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ["--no-deps", "--no-build-isolation", "--target", str(site), "--editable"]
    run([*PIP, "install", *options, str(clone)], cwd=tmp_path)
    assert imports_from(site, cwd=tmp_path) == clone / "distplat/platform/errors.py"
