"""One process of a script and its watcher: exit codes, signals, orphans."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from script_processes import IGNORES_SIGTERM, has_exited, read_pids

from distplat.actors import script_process
from distplat.actors.script_process import ScriptProcess, with_python
from distplat.platform.torchrun import ProcessLocation


def test_python_command_uses_the_workers_interpreter() -> None:
    assert with_python(["python", "-m", "x"]) == [sys.executable, "-m", "x"]
    assert with_python(["train.py", "--lr", "1"]) == [sys.executable, "train.py", "--lr", "1"]
    assert with_python(["bash", "train.sh"]) == ["bash", "train.sh"]


@pytest.mark.skipif(sys.platform != "linux", reason="requires Linux")
def test_descendants_end_with_the_actors_process(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = IGNORES_SIGTERM.format(note=note, then="wait; true")
    outer = f"""
import os, time
from distplat.actors.script_process import ScriptProcess
ScriptProcess(None).start(["bash", "-c", {script!r}], {{}}, None, 60.0)
while not os.path.exists({str(note)!r}) or not open({str(note)!r}).read().endswith("\\n"):
    time.sleep(0.02)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", outer], timeout=60, check=False)
    pids = read_pids(note)
    assert len(pids) == 4
    assert all(has_exited(pid) for pid in pids)


def start(*command: str) -> ScriptProcess:
    process = ScriptProcess(lambda: ProcessLocation("node-0", "127.0.0.1"))
    assert process.start(command, {}, None, 60.0) == ""
    return process


def wait_for_exit(process: ScriptProcess) -> tuple[list[str], int]:
    """Return the output lines and the exit code of a process."""
    lines: list[str] = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        output = process.output(len(lines), 1.0)
        lines += output.lines
        if output.exit_code is not None and not output.lines:
            return lines, output.exit_code
    raise AssertionError("the process did not exit")


@pytest.mark.skipif(sys.platform != "linux", reason="requires Linux")
def test_script_ends_with_its_watcher() -> None:
    process = start("bash", "-c", "echo $$ $PPID; exec sleep 999")
    [line] = process.output(0, 30.0).lines
    script, watcher = (int(pid) for pid in line.split())
    os.kill(watcher, signal.SIGKILL)
    assert wait_for_exit(process) == ([line], -signal.SIGKILL)
    assert has_exited(script)


@pytest.mark.skipif(sys.platform != "linux", reason="requires Linux")
def test_script_ends_with_watcher_that_has_unread_signal() -> None:
    """On Linux the actor then reads ECONNRESET."""
    process = start("bash", "-c", "echo $PPID; exec sleep 999")
    [line] = process.output(0, 30.0).lines
    os.kill(int(line), signal.SIGSTOP)
    process.terminate()
    os.kill(int(line), signal.SIGKILL)
    assert wait_for_exit(process) == ([line], -signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="$PPID is the watcher only on Linux")
def test_watcher_survives_signals_to_all_processes() -> None:
    """`scancel` and systemd with `KillMode=control-group` send such signals."""
    process = start("bash", "-c", "trap 'exit 7' TERM; sleep 999 & echo $PPID; wait")
    [line] = process.output(0, 30.0).lines
    for signal_number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(int(line), signal_number)
    process.terminate()
    assert wait_for_exit(process)[1] == 7


EXTRA_SIGCHLD = """
import os, runpy, signal, sys
original = os.waitpid
def waitpid(*args):
    status = original(*args)
    os.kill(os.getpid(), signal.SIGCHLD)
    return status
os.waitpid = waitpid
runpy.run_path({watcher!r}, run_name="__main__")
"""
"""Watcher with one more SIGCHLD after each `waitpid`, as if many orphans ended."""


def test_exit_code_survives_concurrent_sigchld(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "again.py"
    file.write_text(EXTRA_SIGCHLD.format(watcher=script_process._WATCHER))
    monkeypatch.setattr(script_process, "_WATCHER", str(file))
    assert wait_for_exit(start("bash", "-c", "exit 3")) == ([], 3)


@pytest.mark.skipif(sys.platform != "linux", reason="requires Linux")
def test_orphans_end_if_actor_dies_before_reading_exit_code(tmp_path: Path) -> None:
    """On Linux the watcher then reads ECONNRESET."""
    note = tmp_path / "pids"
    script = IGNORES_SIGTERM.format(note=note, then="exit 0")
    actor_end, watcher_end = socket.socketpair()
    with actor_end, watcher_end:
        actor_end.settimeout(60)
        command = [sys.executable, script_process._WATCHER, "bash", "-c", script]
        watcher = subprocess.Popen(command, stdin=watcher_end.fileno())
        watcher_end.close()
        read_pids(note)
        actor_end.recv(1)  # the script runs
        deadline = time.monotonic() + 30
        while actor_end.recv(9, socket.MSG_PEEK) != b"0\n":
            assert time.monotonic() < deadline, "the process did not exit"
            time.sleep(0.01)
    assert watcher.wait(60) == 0
    assert all(has_exited(pid) for pid in read_pids(note))


def test_start_has_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Example: the disk of the script's folder does not respond."""
    file, note = tmp_path / "hung.py", tmp_path / "pids"
    text = f"import os, sys; open({str(note)!r}, 'w').write(f'{{os.getpid()}}\\n'); os.read(0, 1)"
    file.write_text(text)
    monkeypatch.setattr(script_process, "_WATCHER", str(file))
    process = ScriptProcess(lambda: ProcessLocation("node-0", "127.0.0.1"))
    error = "it did not start within 0.5 s; `--start-timeout` changes this deadline"
    for _ in range(2):
        assert process.start(["true"], {}, None, 0.5) == error
    assert all(has_exited(pid) for pid in read_pids(note))


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -SEGV $$", -11), ("cat", 0)])
def test_exit_code_of_command(script: str, code: int) -> None:
    assert wait_for_exit(start("bash", "-c", script)) == ([], code)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_watcher_does_not_change_the_environment_of_the_command() -> None:
    """Compare signals, limits, environment variables, open files and working directory."""
    script = (
        "grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status; "  # SigQ also counts other processes
        "ulimit -a; env | sort; ls /proc/self/fd; umask; pwd"
    )
    expected = subprocess.run(
        ["bash", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"PYTHONUNBUFFERED": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", **os.environ},
        check=True,
    )
    assert wait_for_exit(start("bash", "-c", script)) == (expected.stdout.splitlines(), 0)


def test_sets_nccl_error_handling_like_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.delenv(name, raising=False)
    assert wait_for_exit(start("bash", "-c", f"echo ${name}")) == (["1"], 0)
    monkeypatch.setenv(name, "0")
    assert wait_for_exit(start("bash", "-c", f"echo ${name}")) == (["0"], 0)
