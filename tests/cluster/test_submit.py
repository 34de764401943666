"""`distplat submit` without a cluster: starts a private Ray, which ends with the run."""

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
from heads import (
    SLOW_JOB,
    clean_environ,
    make_folder,
    read_until,
    run_distplat,
    short_folder,
    start_distplat,
)
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


def test_private_run_prints_progress_and_writes_run_directory(
    folder: Path, home: Path, tmp_path: Path
) -> None:
    environ = clean_environ(home, "disabled")
    (home / "ray").mkdir()
    (home / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")  # of a cluster that has ended
    completed = run_distplat("submit", str(folder / "job.yaml"), environ=environ, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "running on a local Ray, for this run only\n" in completed.stderr
    assert re.search(r"step 1/40  epoch 1  loss [\d.]+  \d+ samples/s\n", completed.stderr)
    assert "evaluation after step 40  loss" in completed.stderr
    assert "distplat is" in completed.stderr  # output of the task is not on stdout
    names = [re.split(r"  +", line)[0] for line in completed.stdout.splitlines()]
    rows = "strategy,workers,steps,final loss,evaluation,speed,time,took,run directory,model"
    assert names == rows.split(",")
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run.iterdir()} >= {
        *("job.yaml", "metrics.jsonl", "model.safetensors", "result.json")
    }


@pytest.mark.parametrize(
    ("line", "delay_s", "name", "code"),
    [
        slow("starting", 1.0, "SIGTERM", 143),
        slow("starting", 1.0, "SIGINT", 130),
        ("step 1/5000", 0.0, "SIGINT", 130),
    ],
)
def test_signal_ends_private_run_and_all_processes(
    line: str, delay_s: float, name: str, code: int, folder: Path, home: Path, tmp_path: Path
) -> None:
    environ = clean_environ(home, "disabled")
    process = start_distplat(["submit", str(folder / "job.yaml"), *SLOW_JOB], environ, tmp_path)
    read_until(process, line)
    time.sleep(delay_s)  # during the start of Ray, which must not be interrupted
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
    """Return the address of the Ray that a driver has started."""
    for process in psutil.Process(driver).children(recursive=True):
        for argument in process.cmdline():
            if argument.startswith("--gcs-address="):
                return argument.partition("=")[2]
    raise AssertionError("the driver has started no Ray")


@pytest.mark.slow
def test_stop_ends_private_run(folder: Path, home: Path, tmp_path: Path) -> None:
    environ = clean_environ(home, "disabled")
    process = start_distplat(["submit", str(folder / "job.yaml"), *SLOW_JOB], environ, tmp_path)
    read_until(process, "step 1/5000")
    # Without an address, `stop` may find the Ray of another test.
    command = "stop", "line", "--address", private_ray(process.pid)
    stopped = run_distplat(*command, environ=environ, cwd=tmp_path)
    assert (stopped.returncode, stopped.stdout) == (0, "line: STOPPED\n"), stopped.stderr
    _, printed = process.communicate(timeout=90)
    assert process.returncode == 143
    assert "the run is asked to stop" in printed
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["status"] == "STOPPED"
    again = run_distplat(*command, environ=environ, cwd=tmp_path)
    assert again.returncode != 0
