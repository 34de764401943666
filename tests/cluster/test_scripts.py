"""`distplat submit -- COMMAND` runs a script as torchrun does; scripts end with the run."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from heads import BIN, run_distplat, script_environ, short_folder, start_distplat
from marks import slow

pytestmark = pytest.mark.cluster

SCRIPT = Path(__file__).parents[2] / "examples" / "ddp_script" / "train.py"
WAITING = """
import os, sys, time
print(f"pid {os.getpid()}", flush=True)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    time.sleep(60)
"""


@pytest.fixture
def environ() -> Iterator[dict[str, str]]:
    home = short_folder()
    yield script_environ(home)
    shutil.rmtree(home, ignore_errors=True)


def pids(process: "subprocess.Popen[str]", count: int) -> list[int]:
    """Read the scripts' output until `count` processes have printed their pid."""
    assert process.stdout is not None
    found: list[int] = []
    while len(found) < count:
        words = process.stdout.readline().split()
        assert words, "the run ended early"
        found += [int(words[-1])] if "pid" in words else []
    return found


@pytest.mark.parametrize("workers", ["1", slow("2")])
def test_ddp_script_prints_the_same_as_under_torchrun(
    workers: str, environ: dict[str, str], tmp_path: Path
) -> None:
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", workers, str(SCRIPT)]
    torchrun = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90)
    assert torchrun.returncode == 0, torchrun.stderr
    args = ("submit", "--num-workers", workers, "-o", "json", "--", "python", str(SCRIPT))
    submit = run_distplat(*args, environ=environ, cwd=tmp_path)
    assert submit.returncode == 0, submit.stderr
    facts = json.loads(submit.stdout)
    log = Path(facts["run_directory"], "rank-0.log").read_text()
    assert log == torchrun.stdout
    assert log.count("epoch") == 5
    prefix = "[0] " if workers == "2" else ""
    assert all(f"{prefix}{line}" in submit.stderr.splitlines() for line in log.splitlines())


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(WAITING)
    args = ["submit", "--num-workers", "2", "--", "python", "wait.py"]
    process = start_distplat(args, environ, tmp_path)
    scripts = [psutil.Process(pid) for pid in pids(process, 2)]
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode == 130
    _, alive = psutil.wait_procs([*family, *scripts], timeout=30)
    assert alive == []
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["status"] == "STOPPED"


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def actor_of(pid: int) -> psutil.Process:
    """Return the process of the actor that has started a script."""
    return next(p for p in psutil.Process(pid).parents() if "ScriptProcess" in p.name())


def test_killed_actor_ends_its_script_and_all_restart(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """The script is a child of a shell, as with many launchers."""
    (tmp_path / "wait.py").write_text(WAITING)
    (tmp_path / "run.sh").write_text("python wait.py\nexit $?\n")
    args = ["submit", "--num-workers", "2", "--max-restarts", "1", "--", "bash", "run.sh"]
    process = start_distplat(args, environ, tmp_path)
    scripts = [psutil.Process(pid) for pid in pids(process, 2)]
    actor_of(scripts[0].pid).kill()
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert "restart 1 of 1" in output
    assert output.count("pid") == 2
    _, alive = psutil.wait_procs(scripts, timeout=30)
    assert alive == []


def test_killed_driver_ends_scripts_that_ignore_sigterm(
    environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "run.sh").write_text('trap "" TERM\nsleep 999 &\necho pid $$\nwait\n')
    process = start_distplat(["submit", "--", "bash", "run.sh"], environ, tmp_path)
    [shell] = pids(process, 1)
    scripts = process_tree(shell)
    assert len(scripts) == 2
    process.kill()
    process.communicate(timeout=90)
    _, alive = psutil.wait_procs(scripts, timeout=30)
    assert alive == []
