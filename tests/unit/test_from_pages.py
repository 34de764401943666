"""Both sides of the pages below docs/from with a train function print what the page says."""

import difflib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import DOCS, files_of

from distplat import Trainer

PAGES = ["lightning", "accelerate"]
_CHANGED = [
    ("lightning", "after.py", 3),
    ("lightning", "loop.py", 12),
    ("accelerate", "after.py", 2),
    ("accelerate", "loop.py", 9),
    ("ddp", "loop.py", 2),
    ("ray_train", "after.py", 4),
]


def folder_of(page: str, tmp_path: Path) -> Path:
    """Write a page's files."""
    files = files_of(f"from/{page}.md")
    assert [*files] == ["before.py", "after.py", "job.yaml", "loop.py"]
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


@pytest.fixture
def _new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Undo what Lightning and Accelerate leave behind in a process and its directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # Lightning sets them where nobody has
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("loop", None)
    if (found := sys.modules.get("accelerate.state")) is not None:
        found.AcceleratorState._reset_state(True)


@pytest.mark.sweep(2)
@pytest.mark.usefixtures("_new_process")
@pytest.mark.filterwarnings("ignore")  # Lightning's
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("side", ["after.py", "loop.py"])
def test_after(
    side: str, page: str, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One worker has the batch of two; two: tests/cluster/test_from_ray_train.py."""
    if side == "after.py":
        pytest.importorskip(page)
    folder = folder_of(page, tmp_path)
    text = (folder / side).read_text().replace("batch_size=32", "batch_size=64")
    (folder / side).write_text(text.replace("devices=2", "devices=1"))
    job: dict[str, Any] = yaml.safe_load((folder / "job.yaml").read_text())
    task = {"after.py": job["task"], "loop.py": "loop:train"}[side]
    one = {"scaling": {"num_workers": 0}, "strategy": strategy, "storage_path": str(tmp_path)}
    Trainer({**job, **one, "task": task}, working_dir=folder, progress=False).fit()
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


@pytest.mark.parametrize(("page", "side", "most"), _CHANGED)
def test_few_lines_change(page: str, side: str, most: int) -> None:
    """As many as the page says; the job is not counted."""
    files = files_of(f"from/{page}.md")
    texts = next(iter(files.values())), files[side]
    before, after = (text.partition("if __name__")[0].splitlines() for text in texts)
    new = [one for one in difflib.ndiff(before, after) if one.startswith("+ ") and one[2:].strip()]
    assert len(new) == most, "\n".join(new)
