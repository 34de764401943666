"""The two sides of docs/from/ray_train.md train the same; two workers of other pages do."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import distplat, script_environ, short_folder
from pages import DOCS, files_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    home = short_folder()
    # Each run starts a Ray of its own, whatever else runs on this machine.
    yield {**script_environ(home), "RAY_ADDRESS": "local", "RAY_TRAIN_V2_ENABLED": "1"}
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files."""
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
def before(folder: Path, environ: dict[str, str]) -> float:
    """The loss under Ray Train; its packages come with the extra `bench`."""
    pytest.importorskip("pyarrow")
    return final_loss("before.py", folder, environ)


def test_the_final_losses_are_equal(before: float, folder: Path, environ: dict[str, str]) -> None:
    assert final_loss("after.py", folder, environ) == pytest.approx(before, abs=2e-4)


def test_a_job_file_trains_the_same_function(
    before: float, folder: Path, environ: dict[str, str]
) -> None:
    job = 'name: digits\ntask: "after:train"\ntask_args: {lr: 0.1}\nstrategy: ring\n'
    (folder / "job.yaml").write_text(job + "scaling: {num_workers: 2}\n")
    done = distplat("submit", "job.yaml", "-o", "json", environ=environ, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["loss"] == pytest.approx(before, abs=2e-4)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("page", ["lightning", "accelerate"])
@pytest.mark.parametrize("task", ["after.py", "loop:train"])
def test_two_workers_print_what_the_page_says(
    task: str, page: str, strategy: str, tmp_path: Path, environ: dict[str, str]
) -> None:
    """With one worker, and before: tests/unit/test_from_pages.py."""
    if task == "after.py":
        pytest.importorskip(page)
    for name, text in files_of(f"from/{page}.md").items():
        (tmp_path / name).write_text(text)
    given = ("submit", "job.yaml", "--strategy", strategy, "--set", f"task={task}")
    done = distplat(*given, environ=environ, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    wanted = re.findall(r"print `final loss ([\d.]+)", (DOCS / f"from/{page}.md").read_text())
    printed = re.findall(r"final loss ([\d.]+)", done.stdout + done.stderr)
    assert printed[0] == wanted[0]
