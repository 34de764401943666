"""Both sides of the pages below docs/from with a train function print what the page says."""

import difflib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import DOCS, files_of

from distplat import Trainer

PAGES = ["lightning", "accelerate"]
_CHANGED = {"lightning": 15, "accelerate": 10, "ddp": 2, "ray_train": 4}
_SIDES = {"ddp": ("train.py", "loop.py")}


def folder_of(page: str, tmp_path: Path) -> Path:
    """Write a page's files."""
    files = files_of(f"from/{page}.md")
    assert [*files] == ["before.py", "after.py", "job.yaml"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def promised(page: str) -> str:
    (found,) = re.findall(r"print `(final loss [^`]+)`", (DOCS / f"from/{page}.md").read_text())
    return str(found)


def agree(printed: str, wanted: str) -> None:
    loss = r"final loss ([\d.]+)"
    (line,) = re.findall(r"final loss .*", printed)
    (found,), (figure,) = re.findall(loss, line), re.findall(loss, wanted)
    assert float(found) == pytest.approx(float(figure), abs=2e-4)
    assert line.partition(",")[2] == wanted.partition(",")[2]


@pytest.mark.parametrize("page", PAGES)
def test_before(page: str, tmp_path: Path) -> None:
    pytest.importorskip(page)
    folder = folder_of(page, tmp_path)
    command = [sys.executable, "before.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    agree(done.stdout, promised(page))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
@pytest.mark.parametrize("page", PAGES)
def test_after(
    page: str, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(page, tmp_path)
    job: dict[str, Any] = yaml.safe_load((folder / "job.yaml").read_text())
    made: dict[str, Any] = {}
    exec((folder / "after.py").read_text(), made)
    one = {"scaling": {"num_workers": 0}, "strategy": strategy, "storage_path": str(tmp_path)}
    del job["task"]
    Trainer({**job, **one}, made["train"], progress=False).fit()
    agree(capsys.readouterr().out, promised(page))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_the_loop_of_a_ddp_script(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One worker has the batch of two; two: tests/cluster/test_from_ddp.py."""
    text, made = files_of("from/ddp.md")["loop.py"], dict[str, Any]()
    exec(text.replace("batch_size=32", "batch_size=64"), made)
    one = {"scaling": {"num_workers": 0}, "strategy": strategy, "storage_path": str(tmp_path)}
    Trainer({"name": "digits", **one}, made["train"], progress=False).fit()
    agree(capsys.readouterr().out, promised("ddp"))


@pytest.mark.parametrize("page", _CHANGED)
def test_few_lines_change(page: str) -> None:
    files, sides = files_of(f"from/{page}.md"), _SIDES.get(page, ("before.py", "after.py"))
    loops = (files[name].partition("if __name__")[0] for name in sides)  # the job is not counted
    before, after = (text.splitlines() for text in loops)
    new = [one for one in difflib.ndiff(before, after) if one.startswith("+ ") and one[2:].strip()]
    assert len(new) <= _CHANGED[page], "\n".join(new)
