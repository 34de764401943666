"""Signals while a run goes on, in processes of their own: a test runner has handlers itself."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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
    ("signals", "said"),
    [
        ("SIGINT", "130 waited killed"),
        ("SIGTERM", "143 waited killed"),
        ("SIGHUP", "129 waited killed"),
        ("SIGINT SIGINT", "130 killed at once"),
        ("SIGTERM SIGINT", "143 killed at once"),
        ("SIGHUP SIGTERM", "129 killed at once"),
    ],
)
def test_the_second_signal_waits_for_nothing_and_ends_everything(signals: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, signals], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines() == [said, "before True"]
    assert "no such actor" in done.stderr


WAITS = """
import os, pathlib, sys, time
pathlib.Path("begun.partial").write_text(str(os.getpid()))
pathlib.Path("begun.partial").rename("begun")
time.sleep(60)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_command_without_a_run_ends_in_order_too(name: str, code: int, tmp_path: Path) -> None:
    """As at Ctrl-C, what it has started ends with it: here the import of the task."""
    (tmp_path / "slow.py").write_text(WAITS)
    (tmp_path / "job.yaml").write_text("name: slow\nstrategy: ring\ntask: slow:train\n")
    command = [sys.executable, "-m", "distplat.cli.main", "validate", "job.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=100)
    assert (process.returncode, said) == (code, f"error: interrupted by {name}\n")
    assert not psutil.pid_exists(int((tmp_path / "begun").read_text()))


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`None` could not be put back: a program in which Python runs has set it."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with Stopping() as stopping:
        stopping.check()


def test_what_nohup_ignores_stays_ignored() -> None:
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SCRIPT
    script = script.replace("signals[0])", "signal.SIGHUP)")
    done = subprocess.run(
        [sys.executable, "-c", script, "SIGINT"], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines() == ["before True"], "nobody was asked to stop"
