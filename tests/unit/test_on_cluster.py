"""Packages that a cluster's Python lacks are named before any import of them."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from distplat.cli import on_cluster

ROOT = Path(__file__).parents[2]


def test_needed_modules_match_the_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[><=!~;]", entry)[0].strip() for entry in project["dependencies"]}
    assert set(on_cluster.NEEDED.values()) == names
    oldest = ".".join(map(str, on_cluster.OLDEST))
    assert project["requires-python"] == f">={oldest}"
    assert all(find_spec(module) is not None for module in on_cluster.NEEDED)
    assert on_cluster.problem() is None


def test_missing_packages_are_reported_with_path_and_remedy() -> None:
    command = [sys.executable, "-S", "-m", "distplat.cli.on_cluster"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert process.returncode == on_cluster.EXIT_CODE
    lines = process.stderr.splitlines()
    assert lines[0].startswith(f"error: the cluster's Python, {sys.executable} (")
    assert "lacks packages that distplat needs: ray[default], torch, numpy" in lines[0]
    assert lines[1].startswith('install it there, or submit with --runtime-env-json \'{"pip": [')
    assert len(lines) == 2


def test_old_python_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cluster, "OLDEST", (99, 0))
    assert "is too old: distplat needs 99.0 or later" in str(on_cluster.problem())


def test_module_imports_only_the_standard_library() -> None:
    code = "import sys; from distplat.cli import on_cluster; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stderr
    assert not {"typer", "torch", "pydantic"} & set(process.stdout.split())
