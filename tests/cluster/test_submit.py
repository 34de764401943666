"""`distplat submit` without a cluster: a Ray of its own, which ends with the run."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from heads import SLOW, clean_environ, distplat, make_folder, read_until, short_folder, start
from marks import slow

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("user"))


@pytest.fixture
def home() -> Iterator[Path]:
    path = short_folder()
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_a_run_of_its_own_prints_progress_and_leaves_a_directory(
    folder: Path, home: Path, tmp_path: Path
) -> None:
    environ = clean_environ(home, "disabled")
    (home / "ray").mkdir()
    (home / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")  # of a cluster that is gone
    done = distplat("submit", str(folder / "job.yaml"), environ=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "running on a local Ray, for this run only\n" in done.stderr
    assert re.search(r"step 1/40  epoch 1  loss [\d.]+  \d+ samples/s\n", done.stderr)
    assert "evaluation after step 40  loss" in done.stderr
    assert "distplat is" in done.stderr  # what the task prints is no result
    names = [re.split(r"  +", line)[0] for line in done.stdout.splitlines()]
    rows = "strategy,workers,steps,final loss,evaluation,speed,time,took,run directory,model"
    assert names == rows.split(",")
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run.iterdir()} >= {
        *("job.yaml", "metrics.jsonl", "model.safetensors", "result.json")
    }


@pytest.mark.parametrize(
    ("line", "later_s", "name", "code"),
    [
        slow("starting", 1.0, "SIGTERM", 143),
        slow("starting", 1.0, "SIGINT", 130),
        ("step 1/5000", 0.0, "SIGINT", 130),
    ],
)
def test_a_signal_ends_a_run_of_its_own_and_all_its_processes(
    line: str, later_s: float, name: str, code: int, folder: Path, home: Path, tmp_path: Path
) -> None:
    environ = clean_environ(home, "disabled")
    process = start(["submit", str(folder / "job.yaml"), *SLOW], environ, tmp_path)
    read_until(process, line)
    time.sleep(later_s)  # into the start of Ray, which must not be cut off
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    os.killpg(process.pid, getattr(signal, name))
    process.communicate(timeout=90)
    assert process.returncode == code
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["status"] == "STOPPED"


def private_ray(driver: int) -> str:
    """Give the address of the Ray that a driver has started."""
    for process in psutil.Process(driver).children(recursive=True):
        for argument in process.cmdline():
            if argument.startswith("--gcs-address="):
                return argument.partition("=")[2]
    raise AssertionError("it has started none")


@pytest.mark.slow
def test_stop_ends_a_run_that_no_job_api_knows(folder: Path, home: Path, tmp_path: Path) -> None:
    environ = clean_environ(home, "disabled")
    process = start(["submit", str(folder / "job.yaml"), *SLOW], environ, tmp_path)
    read_until(process, "step 1/5000")
    # Other tests' Rays run beside it, and without an address one of them may be asked.
    named = "stop", "line", "--address", private_ray(process.pid)
    stopped = distplat(*named, environ=environ, cwd=tmp_path)
    assert (stopped.returncode, stopped.stdout) == (0, "line: STOPPED\n"), stopped.stderr
    _, printed = process.communicate(timeout=90)
    assert process.returncode == 143
    assert "the run is asked to stop" in printed
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["status"] == "STOPPED"
    again = distplat(*named, environ=environ, cwd=tmp_path)
    assert again.returncode != 0
