"""`distplat submit -- COMMAND`: a script runs as under torchrun, and ends with its run."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from heads import BIN, distplat, script_environ, short_folder, start

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
    """Read the script's own lines until so many processes have said who they are."""
    assert process.stdout is not None
    found: list[int] = []
    while len(found) < count:
        words = process.stdout.readline().split()
        assert words, "the run has ended"
        found += [int(words[-1])] if "pid" in words else []
    return found


def test_a_ddp_script_prints_what_it_prints_under_torchrun(
    environ: dict[str, str], tmp_path: Path
) -> None:
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    theirs = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90)
    assert theirs.returncode == 0, theirs.stderr
    given = ("submit", "--num-workers", "2", "-o", "json", "--", "python", str(SCRIPT))
    ours = distplat(*given, environ=environ, cwd=tmp_path)
    assert ours.returncode == 0, ours.stderr
    facts = json.loads(ours.stdout)
    log = Path(facts["run_directory"], "rank-0.log").read_text()
    assert log == theirs.stdout
    assert log.count("epoch") == 5
    assert all(f"[0] {line}" in ours.stderr.splitlines() for line in log.splitlines())


def test_ctrl_c_ends_all_processes(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(WAITING)
    given = ["submit", "--num-workers", "2", "--", "python", "wait.py"]
    process = start(given, environ, tmp_path)
    scripts = [psutil.Process(pid) for pid in pids(process, 2)]
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode == 130
    _, alive = psutil.wait_procs([*family, *scripts], timeout=30)
    assert alive == []
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["status"] == "STOPPED"


def family_of(pid: int) -> list[psutil.Process]:
    """Give a process and all that it has started."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def actor_of(pid: int) -> psutil.Process:
    """Give the process of the actor that has started a script."""
    return next(one for one in psutil.Process(pid).parents() if "ScriptProcess" in one.name())


def test_a_killed_actor_takes_all_of_its_script_along_and_all_begin_anew(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """The script is a shell's child, as under many launchers."""
    (tmp_path / "wait.py").write_text(WAITING)
    (tmp_path / "run.sh").write_text("python wait.py\nexit $?\n")
    given = ["submit", "--num-workers", "2", "--max-restarts", "1", "--", "bash", "run.sh"]
    process = start(given, environ, tmp_path)
    scripts = [psutil.Process(pid) for pid in pids(process, 2)]
    actor_of(scripts[0].pid).kill()
    rest, _ = process.communicate(timeout=90)
    assert process.returncode == 0, rest
    assert "restart 1 of 1" in rest
    assert rest.count("pid") == 2
    _, alive = psutil.wait_procs(scripts, timeout=30)
    assert alive == []


def test_a_killed_driver_leaves_nothing_that_does_not_hear_sigterm(
    environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "run.sh").write_text('trap "" TERM\nsleep 999 &\necho pid $$\nwait\n')
    process = start(["submit", "--", "bash", "run.sh"], environ, tmp_path)
    [shell] = pids(process, 1)
    scripts = family_of(shell)
    assert len(scripts) == 2
    process.kill()
    process.communicate(timeout=90)
    _, alive = psutil.wait_procs(scripts, timeout=30)
    assert alive == []
