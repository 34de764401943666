"""One process of a script, its watcher, and what the two leave behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from script_processes import DEAF, gone, read

from distplat.actors import script_process
from distplat.actors.script_process import ScriptProcess, with_python
from distplat.platform.torchrun import ProcessLocation


def test_the_interpreter_is_that_of_the_worker() -> None:
    assert with_python(["python", "-m", "x"]) == [sys.executable, "-m", "x"]
    assert with_python(["train.py", "--lr", "1"]) == [sys.executable, "train.py", "--lr", "1"]
    assert with_python(["bash", "train.sh"]) == ["bash", "train.sh"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_all_that_a_script_starts_ends_with_the_process_of_its_actor(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = DEAF.format(note=note, then="wait; true")
    outer = f"""
import os, time
from distplat.actors.script_process import ScriptProcess
ScriptProcess(None).start(["bash", "-c", {script!r}], {{}}, None, 60.0)
while not os.path.exists({str(note)!r}) or not open({str(note)!r}).read().endswith("\\n"):
    time.sleep(0.02)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", outer], timeout=60, check=False)
    pids = read(note)
    assert len(pids) == 4
    assert all(gone(pid) for pid in pids)


def start(*command: str) -> ScriptProcess:
    process = ScriptProcess(lambda: ProcessLocation("node-0", "127.0.0.1"))
    assert process.start(command, {}, None, 60.0) == ""
    return process


def end_of(process: ScriptProcess) -> tuple[list[str], int]:
    """Give the lines of a process, and its exit code."""
    lines: list[str] = []
    until = time.monotonic() + 30
    while time.monotonic() < until:
        output = process.output(len(lines), 1.0)
        lines += output.lines
        if output.exit_code is not None and not output.lines:
            return lines, output.exit_code
    raise AssertionError("it has not ended")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_a_script_ends_with_its_watcher() -> None:
    process = start("bash", "-c", "echo $$ $PPID; exec sleep 999")
    [line] = process.output(0, 30.0).lines
    script, watcher = (int(word) for word in line.split())
    os.kill(watcher, signal.SIGKILL)
    assert end_of(process) == ([line], -signal.SIGKILL)
    assert gone(script)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_a_watcher_that_is_killed_with_an_unread_signal_ends_its_script() -> None:
    """Linux tells the actor of such an end by ECONNRESET."""
    process = start("bash", "-c", "echo $PPID; exec sleep 999")
    [line] = process.output(0, 30.0).lines
    os.kill(int(line), signal.SIGSTOP)
    process.terminate()
    os.kill(int(line), signal.SIGKILL)
    assert end_of(process) == ([line], -signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="$PPID need not be the watcher elsewhere")
def test_a_signal_to_all_processes_ends_no_watcher() -> None:
    """As from `scancel`, and from systemd with `KillMode=control-group`."""
    process = start("bash", "-c", "trap 'exit 7' TERM; sleep 999 & echo $PPID; wait")
    [line] = process.output(0, 30.0).lines
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(int(line), number)
    process.terminate()
    assert end_of(process)[1] == 7


AGAIN = """
import os, runpy, signal, sys
real = os.waitpid
def waitpid(*given):
    ended = real(*given)
    os.kill(os.getpid(), signal.SIGCHLD)
    return ended
os.waitpid = waitpid
runpy.run_path({watcher!r}, run_name="__main__")
"""
"""A watcher that gets one more SIGCHLD after each `waitpid`, as where orphans end by the dozen."""


def test_no_exit_code_is_lost_where_others_end_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "again.py"
    file.write_text(AGAIN.format(watcher=script_process._WATCHER))
    monkeypatch.setattr(script_process, "_WATCHER", str(file))
    assert end_of(start("bash", "-c", "exit 3")) == ([], 3)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_orphans_end_with_an_actor_that_had_not_read_the_exit_code(tmp_path: Path) -> None:
    """Linux tells the watcher of such an end by ECONNRESET."""
    note = tmp_path / "pids"
    script = DEAF.format(note=note, then="exit 0")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)
        line = [sys.executable, script_process._WATCHER, "bash", "-c", script]
        watcher = subprocess.Popen(line, stdin=theirs.fileno())
        theirs.close()
        read(note)
        ours.recv(1)  # the script runs
        until = time.monotonic() + 30
        while ours.recv(9, socket.MSG_PEEK) != b"0\n":
            assert time.monotonic() < until, "it has not ended"
            time.sleep(0.01)
    assert watcher.wait(60) == 0
    assert all(gone(pid) for pid in read(note))


def test_a_start_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the disk of the script's folder gives no answer."""
    file, note = tmp_path / "hung.py", tmp_path / "pids"
    text = f"import os, sys; open({str(note)!r}, 'w').write(f'{{os.getpid()}}\\n'); os.read(0, 1)"
    file.write_text(text)
    monkeypatch.setattr(script_process, "_WATCHER", str(file))
    process = ScriptProcess(lambda: ProcessLocation("node-0", "127.0.0.1"))
    error = "it did not start within 0.5 s; `--start-timeout` changes this deadline"
    for _ in range(2):
        assert process.start(["true"], {}, None, 0.5) == error
    assert all(gone(pid) for pid in read(note))


@pytest.mark.parametrize(("do", "code"), [("exit 3", 3), ("kill -SEGV $$", -11), ("cat", 0)])
def test_exit_codes_are_the_commands_own(do: str, code: int) -> None:
    assert end_of(start("bash", "-c", do)) == ([], code)


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_command_finds_what_it_would_find_without_a_watcher() -> None:
    """Signals, limits, variables, open files, folder."""
    looks = (
        "grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status; "  # SigQ counts the user's other processes
        "ulimit -a; env | sort; ls /proc/self/fd; umask; pwd"
    )
    alone = subprocess.run(
        ["bash", "-c", looks],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"PYTHONUNBUFFERED": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", **os.environ},
        check=True,
    )
    assert end_of(start("bash", "-c", looks)) == (alone.stdout.splitlines(), 0)


def test_torchs_way_with_errors_of_nccl_is_torchruns_unless_it_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.delenv(name, raising=False)
    assert end_of(start("bash", "-c", f"echo ${name}")) == (["1"], 0)
    monkeypatch.setenv(name, "0")
    assert end_of(start("bash", "-c", f"echo ${name}")) == (["0"], 0)
