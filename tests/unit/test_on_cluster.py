"""What a cluster's Python lacks is named before anything of it is imported."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from distplat.cli import on_cluster

ROOT = Path(__file__).parents[2]


def test_what_is_looked_for_is_what_the_package_depends_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[><=!~;]", one)[0].strip() for one in project["dependencies"]}
    assert set(on_cluster.NEEDED.values()) == names
    oldest = ".".join(map(str, on_cluster.OLDEST))
    assert project["requires-python"] == f">={oldest}"
    assert all(find_spec(module) is not None for module in on_cluster.NEEDED)
    assert on_cluster.problem() is None


def test_a_python_without_packages_is_told_with_its_path_and_the_remedy() -> None:
    command = [sys.executable, "-S", "-m", "distplat.cli.on_cluster"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == on_cluster.EXIT_CODE
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"error: the cluster's Python, {sys.executable} (")
    assert "lacks packages that distplat needs: ray[default], torch, numpy" in lines[0]
    assert lines[1].startswith('install it there, or submit with --runtime-env-json \'{"pip": [')
    assert len(lines) == 2


def test_an_older_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cluster, "OLDEST", (99, 0))
    assert "is too old: distplat needs 99.0 or later" in str(on_cluster.problem())


def test_only_the_standard_library_is_imported_first() -> None:
    code = "import sys; from distplat.cli import on_cluster; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert not {"typer", "torch", "pydantic"} & set(done.stdout.split())
