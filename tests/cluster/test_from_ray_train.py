"""The scripts of docs/from/ train to the same loss; on Ray, with two workers."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import run_distplat, script_environ, short_folder
from pages import DOCS, files_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    home = short_folder()
    # Each run starts a private Ray, even if another Ray runs on this machine.
    yield {**script_environ(home), "RAY_ADDRESS": "local", "RAY_TRAIN_V2_ENABLED": "1"}
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page's files."""
    path = tmp_path_factory.mktemp("page")
    files = files_of("from/ray_train.md")
    assert [*files] == ["before.py", "after.py"]
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def final_loss(script: str, folder: Path, environ: dict[str, str]) -> float:
    done = subprocess.run(
        [sys.executable, script],
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return float(re.findall(r"final loss ([\d.]+)", done.stdout)[-1])


@pytest.fixture(scope="module")
def ray_train_loss(folder: Path, environ: dict[str, str]) -> float:
    """Return the loss under Ray Train; its packages are in the extra `bench`."""
    pytest.importorskip("pyarrow")
    return final_loss("before.py", folder, environ)


def test_final_losses_are_equal(
    ray_train_loss: float, folder: Path, environ: dict[str, str]
) -> None:
    assert final_loss("after.py", folder, environ) == pytest.approx(ray_train_loss, abs=2e-4)


def test_job_file_matches_ray_train(
    ray_train_loss: float, folder: Path, environ: dict[str, str]
) -> None:
    job = 'name: digits\ntask: "after:train"\ntask_args: {lr: 0.1}\nstrategy: ring\n'
    (folder / "job.yaml").write_text(job + "scaling: {num_workers: 2}\n")
    done = run_distplat(
        "submit", "job.yaml", "-o", "json", environ=environ, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["loss"] == pytest.approx(ray_train_loss, abs=2e-4)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("page", ["lightning", "accelerate"])
@pytest.mark.parametrize("task", ["after.py", "loop:train"])
def test_two_workers_print_the_documented_loss(
    task: str, page: str, strategy: str, tmp_path: Path, environ: dict[str, str]
) -> None:
    """One worker, and the scripts before the change: tests/unit/test_from_pages.py."""
    if task == "after.py":
        pytest.importorskip(page)
    for name, text in files_of(f"from/{page}.md").items():
        (tmp_path / name).write_text(text)
    args = ("submit", "job.yaml", "--strategy", strategy, "--set", f"task={task}")
    done = run_distplat(*args, environ=environ, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    wanted = re.findall(r"print `final loss ([\d.]+)", (DOCS / f"from/{page}.md").read_text())
    printed = re.findall(r"final loss ([\d.]+)", done.stdout + done.stderr)
    assert printed[0] == wanted[0]
