"""The sides of docs/from/ddp.md train the same."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import BIN, distplat, script_environ, short_folder
from pages import files_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    home = short_folder()
    yield script_environ(home)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files."""
    path = tmp_path_factory.mktemp("page")
    files = files_of("from/ddp.md")
    assert [*files] == ["train.py", "loop.py", "loop.yaml", "digits.py", "job.yaml"]
    for name, text in files.items():
        (path / name).write_text(text)
    return path


@pytest.fixture(scope="module")
def before(folder: Path, environ: dict[str, str]) -> float:
    """The loss that the script ends with under torchrun."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(
        command, env=environ, cwd=folder, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return float(re.findall(r"final loss ([\d.]+)", done.stdout)[-1])


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_the_final_losses_are_equal(
    strategy: str, before: float, folder: Path, environ: dict[str, str]
) -> None:
    given = ("submit", "job.yaml", "--strategy", strategy, "-o", "json")
    done = distplat(*given, environ=environ, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["loss"] == pytest.approx(before, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "strategy"), [("loop:train", "ring"), ("loop:train", "ps-sync"), ("loop.py", "ring")]
)
def test_the_loop_ends_with_the_same_loss(
    task: str, strategy: str, before: float, folder: Path, environ: dict[str, str]
) -> None:
    """As a function, and as the whole script."""
    given = ("submit", "loop.yaml", "--strategy", strategy, "--set", f"task={task}")
    done = distplat(*given, environ=environ, cwd=folder)
    assert done.returncode == 0, done.stderr
    (printed,) = re.findall(r"final loss ([\d.]+)", done.stdout + done.stderr)
    assert float(printed) == pytest.approx(before, abs=2e-4)
