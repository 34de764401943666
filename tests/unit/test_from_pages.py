"""The scripts of the pages docs/from with a train function print the losses in the pages."""

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
_CHANGED_LINES = [
    ("lightning", "after.py", 3),
    ("lightning", "loop.py", 12),
    ("accelerate", "after.py", 2),
    ("accelerate", "loop.py", 9),
    ("ddp", "loop.py", 2),
    ("ray_train", "after.py", 4),
]


def folder_of(page: str, tmp_path: Path) -> Path:
    """Write the files of a page to a folder."""
    files = files_of(f"from/{page}.md")
    assert [*files] == ["before.py", "after.py", "job.yaml", "loop.py"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def documented_loss(page: str) -> str:
    (line,) = re.findall(r"print `(final loss [^`]+)`", (DOCS / f"from/{page}.md").read_text())
    return str(line)


def assert_losses_agree(printed: str, documented: str) -> None:
    loss = r"final loss ([\d.]+)"
    (line,) = re.findall(r"final loss .*", printed)
    (actual,), (expected,) = re.findall(loss, line), re.findall(loss, documented)
    assert float(actual) == pytest.approx(float(expected), abs=2e-4)
    assert line.partition(",")[2] == documented.partition(",")[2]


@pytest.mark.parametrize("page", PAGES)
def test_original_script_prints_the_documented_loss(page: str, tmp_path: Path) -> None:
    pytest.importorskip(page)
    folder = folder_of(page, tmp_path)
    command = [sys.executable, "before.py"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert_losses_agree(process.stdout, documented_loss(page))


@pytest.fixture
def _new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Undo the changes of Lightning and Accelerate to the process and its directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # Lightning sets unset variables
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("loop", None)
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(True)


@pytest.mark.sweep(2)
@pytest.mark.usefixtures("_new_process")
@pytest.mark.filterwarnings("ignore")  # warnings of Lightning
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("side", ["after.py", "loop.py"])
def test_converted_script_prints_the_documented_loss(
    side: str, page: str, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One worker with the batch of two; tests/cluster/test_from_ray_train.py has two workers."""
    if side == "after.py":
        pytest.importorskip(page)
    folder = folder_of(page, tmp_path)
    text = (folder / side).read_text().replace("batch_size=32", "batch_size=64")
    (folder / side).write_text(text.replace("devices=2", "devices=1"))
    job: dict[str, Any] = yaml.safe_load((folder / "job.yaml").read_text())
    task = {"after.py": job["task"], "loop.py": "loop:train"}[side]
    fields = {"scaling": {"num_workers": 0}, "strategy": strategy, "storage_path": str(tmp_path)}
    Trainer({**job, **fields, "task": task}, working_dir=folder, progress=False).fit()
    assert_losses_agree(capsys.readouterr().out, documented_loss(page))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_loop_of_the_ddp_page(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One worker with the batch of two; tests/cluster/test_from_ddp.py has two workers."""
    text, namespace = files_of("from/ddp.md")["loop.py"], dict[str, Any]()
    exec(text.replace("batch_size=32", "batch_size=64"), namespace)
    fields = {"scaling": {"num_workers": 0}, "strategy": strategy, "storage_path": str(tmp_path)}
    Trainer({"name": "digits", **fields}, namespace["train"], progress=False).fit()
    assert_losses_agree(capsys.readouterr().out, documented_loss("ddp"))


@pytest.mark.parametrize(("page", "side", "count"), _CHANGED_LINES)
def test_number_of_changed_lines(page: str, side: str, count: int) -> None:
    """The number in the page, which does not count the job file."""
    files = files_of(f"from/{page}.md")
    texts = next(iter(files.values())), files[side]
    before, after = (text.partition("if __name__")[0].splitlines() for text in texts)
    new = [d for d in difflib.ndiff(before, after) if d.startswith("+ ") and d[2:].strip()]
    assert len(new) == count, "\n".join(new)
