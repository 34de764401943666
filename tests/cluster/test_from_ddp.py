"""Both sides of docs/from/ddp.md train to the same loss."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import BIN, run_distplat, script_environ, short_folder
from pages import files_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    home = short_folder()
    yield script_environ(home)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page's files."""
    path = tmp_path_factory.mktemp("page")
    files = files_of("from/ddp.md")
    assert [*files] == ["train.py", "loop.py", "loop.yaml", "digits.py", "job.yaml"]
    for name, text in files.items():
        (path / name).write_text(text)
    return path


@pytest.fixture(scope="module")
def torchrun_loss(folder: Path, environ: dict[str, str]) -> float:
    """Return the final loss of the script under torchrun."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(
        command, env=environ, cwd=folder, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return float(re.findall(r"final loss ([\d.]+)", done.stdout)[-1])


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_final_losses_are_equal(
    strategy: str, torchrun_loss: float, folder: Path, environ: dict[str, str]
) -> None:
    args = ("submit", "job.yaml", "--strategy", strategy, "-o", "json")
    done = run_distplat(*args, environ=environ, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["loss"] == pytest.approx(torchrun_loss, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "strategy"), [("loop:train", "ring"), ("loop:train", "ps-sync"), ("loop.py", "ring")]
)
def test_train_function_and_script_match_torchrun(
    task: str, strategy: str, torchrun_loss: float, folder: Path, environ: dict[str, str]
) -> None:
    args = ("submit", "loop.yaml", "--strategy", strategy, "--set", f"task={task}")
    done = run_distplat(*args, environ=environ, cwd=folder)
    assert done.returncode == 0, done.stderr
    (printed,) = re.findall(r"final loss ([\d.]+)", done.stdout + done.stderr)
    assert float(printed) == pytest.approx(torchrun_loss, abs=2e-4)
