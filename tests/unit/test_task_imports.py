"""Check before the upload that the working directory contains all files that a task imports."""

from pathlib import Path

import pytest

from distplat.cli.join import ignores
from distplat.cli.package import EXCLUDES, measure
from distplat.cli.task_imports import check_imports, unshipped_imports
from distplat.platform.errors import SpecError


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def missing(folder: Path, *excluded: str, task: str = "train:Net") -> set[tuple[str, str, int]]:
    """Return file, importer and line of unshipped imports if all files but `gone` are shipped."""
    shipped = {path for path in folder.rglob("*") if path.is_file()}
    shipped -= {folder / name for name in excluded}

    def relative(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    unshipped = unshipped_imports(task, folder, shipped)
    return {(relative(item.path), relative(item.importer), item.line) for item in unshipped}


@pytest.mark.parametrize(
    ("line", "excluded"),
    [
        ("import helpers", "helpers.py"),
        ("import numpy, helpers as h", "helpers.py"),
        ("from helpers import a", "helpers.py"),
        ("from pkg import part", "pkg/part.py"),
        ("from pkg.part import x", "pkg/part.py"),
        ("import pkg.part", "pkg/__init__.py"),
        ("from pkg.inner import deep", "pkg/inner/deep.py"),
        ("def f():\n    import helpers", "helpers.py"),
        ("from helpers import *", "helpers.py"),
    ],
)
def test_unshipped_imports_finds_each_form_of_import(
    tmp_path: Path, line: str, excluded: str
) -> None:
    files = dict.fromkeys(("helpers.py", "pkg/__init__.py", "pkg/part.py", "pkg/inner/deep.py"), "")
    write(tmp_path, {"train.py": f"\n{line}\n", **files})
    expected_line = 3 if "def" in line else 2
    assert missing(tmp_path, excluded) == {(excluded, "train.py", expected_line)}
    assert not missing(tmp_path)


def test_unshipped_imports_follows_imports_of_imports(tmp_path: Path) -> None:
    files = {
        "jobs/__init__.py": "",
        "jobs/train.py": "from . import model\nfrom .model import Net\n",
        "jobs/model.py": "from ..common import layers\n",
        "jobs/deep/__init__.py": "",
        # `import layers` resolves to no file.
        "common/layers.py": "import train_tools\nimport layers\n",
        "train_tools.py": "",
    }
    write(tmp_path, files)
    unshipped = missing(tmp_path, "train_tools.py", task="jobs.train:Net")
    assert unshipped == {("train_tools.py", "common/layers.py", 1)}


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    import local\nexcept ImportError:\n    local = None\n",
        "try:\n    import local\nexcept:\n    local = None\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import local\n",
        "import locale\n",
        "import local_settings_of_another_project\n",
    ],
)
def test_optional_and_unrelated_imports_are_ignored(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"train.py": text, "local.py": ""})
    assert not missing(tmp_path, "local.py")


def test_files_with_syntax_errors_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, {"train.py": "import broken, installed\n", "broken.py": "def ("})
    assert not missing(tmp_path)
    assert not missing(tmp_path, task="elsewhere:Net")


def test_check_imports_reports_file_line_and_remedy(tmp_path: Path) -> None:
    files = {
        "train.py": "import data_tools\nfrom runs import curve\n",
        "data_tools.py": "",
        "runs/curve.py": "",
        ".gitignore": "data_*\n",
    }
    write(tmp_path, files)
    package = measure(tmp_path, EXCLUDES, ignores)
    with pytest.raises(SpecError) as raised:
        check_imports("train:Net", package)
    first, second = sorted(str(problem) for problem in raised.value.problems)
    assert first.startswith("--working-dir: data_tools.py, which train.py:1 imports, is not")
    assert "a .gitignore, a .rayignore or `excludes` lists it" in first
    assert "runs/curve.py, which train.py:2 imports" in second and "runs is never shipped" in second
    (tmp_path / ".gitignore").write_text("train.py\n")
    with pytest.raises(SpecError, match=r"train\.py, which the task imports, is not shipped"):
        check_imports("train:Net", measure(tmp_path, EXCLUDES, ignores))


def test_script_imports_from_its_own_folder(tmp_path: Path) -> None:
    write(tmp_path, {"loops/train.py": "import beside\n", "loops/beside.py": "", "beside.py": ""})
    script = "loops/train.py --lr 0.1"
    assert missing(tmp_path, "beside.py", task=script) == set()
    unshipped = missing(tmp_path, "loops/beside.py", task=script)
    assert unshipped == {("loops/beside.py", "loops/train.py", 1)}
    assert missing(tmp_path, "loops/train.py", task=script)
