"""Signals during a run, in separate processes because pytest has its own handlers."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from marks import slow

from distplat.actors.stopping import Stopping

SCRIPT = """
import os, signal, sys
from distplat.actors.stopping import Stopping, call_all
from distplat.platform.errors import Interrupted

signals = [getattr(signal, name) for name in sys.argv[1].split()]
ended = []

def wait():
    for number in signals[1:]:
        os.kill(os.getpid(), number)
    ended.append("waited")

def refuse():
    raise ValueError("no such actor")

try:
    with Stopping() as stopping:
        os.kill(os.getpid(), signals[0])
        try:
            stopping.check()
        finally:
            try:
                call_all([wait, refuse, lambda: ended.append("killed")])
            except KeyboardInterrupt:
                ended.append("at once")
                stopping.check()
except Interrupted as error:
    print(error.exit_code, *ended)
print("before", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        ("SIGINT", "130 waited killed"),
        ("SIGTERM", "143 waited killed"),
        ("SIGHUP", "129 waited killed"),
        ("SIGINT SIGINT", "130 killed at once"),
        ("SIGTERM SIGINT", "143 killed at once"),
        ("SIGHUP SIGTERM", "129 killed at once"),
    ],
)
def test_second_signal_ends_everything_at_once(signals: str, expected: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, signals], capture_output=True, text=True, timeout=100
    )
    assert process.stdout.splitlines() == [expected, "before True"]
    assert "no such actor" in process.stderr


SLOW_TASK = """
import os, pathlib, sys, time
pathlib.Path("pid.partial").write_text(str(os.getpid()))
pathlib.Path("pid.partial").rename("pid")
time.sleep(60)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), slow("SIGHUP", 129)])
def test_signal_ends_command_without_run(name: str, code: int, tmp_path: Path) -> None:
    """The child process that imports the task ends with the command, as at Ctrl-C."""
    (tmp_path / "slow.py").write_text(SLOW_TASK)
    (tmp_path / "job.yaml").write_text("name: slow\nstrategy: ring\ntask: slow:train\n")
    command = [sys.executable, "-m", "distplat.cli.main", "validate", "job.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "pid").exists() and process.poll() is None:
        assert time.monotonic() < deadline, "the task is not imported"
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=100)
    assert (process.returncode, stderr) == (code, f"error: interrupted by {name}\n")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_keeps_handler_not_set_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that embeds Python may set a handler, which `signal.signal` cannot restore."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with Stopping() as stopping:
        stopping.check()


def test_ignored_sighup_stays_ignored() -> None:
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SCRIPT
    script = script.replace("signals[0])", "signal.SIGHUP)")
    process = subprocess.run(
        [sys.executable, "-c", script, "SIGINT"], capture_output=True, text=True, timeout=100
    )
    assert process.stdout.splitlines() == ["before True"], "no stop was requested"
