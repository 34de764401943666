"""Signals while a run goes on, in processes of their own: a test runner has handlers itself."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys
from distplat.actors.stopping import Stopping, end_each
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
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does when it starts
        stopping.arm()
        os.kill(os.getpid(), signals[0])
        try:
            stopping.check()
        finally:
            try:
                end_each([wait, refuse, lambda: ended.append("killed")])
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
        [sys.executable, "-c", SCRIPT, signals], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == [said, "before True"]
    assert "no such actor" in done.stderr


def test_what_nohup_ignores_stays_ignored() -> None:
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SCRIPT
    script = script.replace("signals[0])", "signal.SIGHUP)")
    done = subprocess.run(
        [sys.executable, "-c", script, "SIGINT"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["before True"], "nobody was asked to stop"
