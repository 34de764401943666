"""Scripts in real processes, over the transport that loses answers on request."""

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from call_faults import Call, Fault, add_rule
from script_processes import DEAF, gone, read

from distplat.actors import script_run
from distplat.actors.local_transport import Actor, LocalCluster
from distplat.actors.script_process import ProcessOutput, ScriptProcess
from distplat.actors.script_run import Attempt, Script, _Rank, run_script
from distplat.platform.errors import ActorLost, DeadlineExceeded, Interrupted, ScriptFailed
from distplat.platform.torchrun import ProcessLocation

NODES = ("node-0", "node-1", "node-0")
HELLO = "import os; print('hello from', os.environ['RANK'])"


class RecordingTerminal:
    """What a terminal was told."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self.told: list[str] = []

    def line(self, rank: int, text: str) -> None:
        self.lines.append((rank, text))

    def notice(self, text: str) -> None:
        self.told.append(text)

    def of(self, rank: int) -> list[str]:
        return [text for one, text in self.lines if one == rank]


class Run:
    """A run in this process."""

    def __init__(self, code: str, nodes: Sequence[str] = NODES, max_restarts: int = 0) -> None:
        command = ("python", "-c", code)
        self.script = Script(command, "run", None, max_restarts, start_timeout_s=20.0)
        self.nodes, self.heard, self.cluster = nodes, RecordingTerminal(), LocalCluster()
        self.actors: list[Actor] = []
        self.interrupt = threading.Event()

    @contextmanager
    def spawn(self, attempt: int) -> Iterator[Sequence[Any]]:
        self.actors = []
        for index, node in enumerate(self.nodes):
            where = ProcessLocation(node, "127.0.0.1")
            body = ScriptProcess(lambda where=where: where)  # type: ignore[misc]
            self.actors.append(self.cluster.spawn(f"process-{index}", node, lambda _, b=body: b))  # type: ignore[misc]
        try:
            yield self.actors
        finally:
            for actor in self.actors:
                actor.die("the attempt is over")

    def check(self) -> None:
        if self.interrupt.is_set():
            raise Interrupted(2)

    def go(self) -> int:
        transport = self.cluster.transport()
        return run_script(self.script, transport, self.spawn, self.heard, self.check)


def test_each_rank_runs_once_and_is_heard() -> None:
    run = Run(HELLO)
    assert run.go() == 0
    assert sorted(run.heard.lines) == [(rank, f"hello from {rank}") for rank in range(3)]


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_lost_messages_lose_and_double_no_line(lost: Any) -> None:
    run = Run("for n in range(300): print(n)")
    draw = random.Random(7)

    def rule(call: Call) -> Fault | None:
        return Fault(lose=lost) if draw.random() < 0.3 else None

    add_rule(run.cluster, rule)
    run.go()
    for rank in range(3):
        assert run.heard.of(rank) == [str(n) for n in range(300)]


def test_more_lines_than_are_kept() -> None:
    run = Run("for n in range(30000): print(n)", nodes=["node-0"])
    run.go()
    assert run.heard.of(0) == [str(n) for n in range(30000)]


FAILING = """
import os, sys, time
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    print(f"pid {os.getpid()}", flush=True)
    sys.exit(3)
print(f"pid {os.getpid()}", flush=True)
time.sleep(999 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
"""


def test_the_first_failure_ends_all() -> None:
    run = Run(FAILING)
    with pytest.raises(ScriptFailed, match="rank 1 ended with exit code 3") as error:
        run.go()
    assert error.value.exit_code == 1
    for _, text in run.heard.lines:
        assert gone(int(text.split()[1]))


def test_all_begin_anew() -> None:
    run = Run(FAILING, max_restarts=1)
    assert run.go() == 1
    [told] = run.heard.told
    assert "rank 1 ended with exit code 3" in told
    assert "restart 1 of 1" in told


def test_who_does_not_hear_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_run, "GRACE_S", 0.5)
    code = f"""
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("pid %d" % os.getpid(), flush=True)
deaf = Path({str(tmp_path / "deaf")!r})
if os.environ["RANK"] == "1":
    deaf.touch()
    time.sleep(60)
while not deaf.exists():
    time.sleep(0.01)
sys.exit(1)
"""
    run = Run(code, nodes=["node-0", "node-0"])
    with pytest.raises(ScriptFailed):
        run.go()
    assert len(run.heard.lines) == 2
    for _, text in run.heard.lines:
        assert gone(int(text.split()[1]))


LEAVING = """
import os, sys, time
rank, until = os.environ["RANK"], time.monotonic() + 60
while rank == "0" and not os.path.exists({told!r}) and time.monotonic() < until:
    time.sleep(0.01)
sys.exit(int(rank == "0"))
"""


def test_who_had_ended_before_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a rank leaves its loop, and another one waits for it."""
    monkeypatch.setattr(script_run, "_NOTICE_S", 0.1)
    file = tmp_path / "told"

    class Told(RecordingTerminal):
        def notice(self, text: str) -> None:
            super().notice(text)
            file.touch()

    run = Run(LEAVING.format(told=str(file)), nodes=["node-0", "node-0"])
    run.heard = Told()
    with pytest.raises(
        ScriptFailed, match=r"rank 0 ended .* 1; .* rank 1 had ended before, with 0"
    ):
        run.go()
    [told] = run.heard.told
    assert told.startswith(
        "rank 1 ended with exit code 0, 0 s ago; still running, maybe waiting for them: rank 0"
    )


def test_a_signal_is_named() -> None:
    run = Run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", nodes=["node-0"])
    with pytest.raises(ScriptFailed, match=r"rank 0 was killed by SIGKILL; was it .*memory"):
        run.go()


SLEEPING = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"


def once_all_are_heard(run: Run, do: Callable[[], object]) -> None:
    """Do something, in a thread, when each of three ranks has said something."""

    def work() -> None:
        until = time.monotonic() + 40
        while len(run.heard.lines) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        do()

    threading.Thread(target=work, daemon=True).start()


def test_a_lost_process_is_named_and_the_others_end() -> None:
    run = Run(SLEEPING)
    once_all_are_heard(run, lambda: run.actors[1].die("its node is gone"))
    # its node comes second
    with pytest.raises(ActorLost, match=r"the process of rank 2 was lost: .*its node is gone"):
        run.go()
    assert len(run.heard.lines) == 3
    for _, text in run.heard.lines:
        assert gone(int(text.split()[1]))


def test_a_process_that_is_frozen_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its actor answers no more. A second passes with each answer of another one."""
    frozen, seconds = threading.Event(), [1.0]
    run = Run(SLEEPING)
    once_all_are_heard(run, frozen.set)

    def rule(call: Call) -> Fault | None:
        if frozen.is_set() and call.actor == "process-0":
            seconds[0] += 1
        return Fault(delay_s=10.0) if frozen.is_set() and call.actor == "process-1" else None

    monkeypatch.setattr(script_run, "AwakeClock", lambda: SimpleNamespace(now=lambda: seconds[0]))
    monkeypatch.setattr(script_run, "_OUTPUT_S", 0.02)
    add_rule(run.cluster, rule)
    with pytest.raises(ActorLost, match=r"rank 2 was lost: it has not answered for 60 s"):
        run.go()


def test_a_slow_terminal_is_no_silence_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second for each line of 70 ranks; the first one is quiet, and answers in turn."""
    seconds = [0.0]

    def later() -> float:
        seconds[0] += 1  # an `AwakeClock` counts no more from one reading to the next
        return seconds[0]

    class Answers:
        turn = 0

        def call(self, actor: int, *question: Any) -> int:
            return actor

        def wait(self, replies: list[int], limit_s: float, everything: bool = False) -> list[int]:
            return [one for one in replies if one or self.turn % 2]

        def get(self, reply: int, limit_s: float) -> ProcessOutput:
            return ProcessOutput(("line",), None)

    monkeypatch.setattr(script_run, "AwakeClock", lambda: SimpleNamespace(now=later))
    transport: Any = Answers()
    heard = RecordingTerminal()
    attempt = Attempt(Script(("x",), "run", None), transport, [], heard, lambda: None)
    attempt._ranks = [_Rank(rank, rank) for rank in range(70)]
    for transport.turn in range(20):
        attempt._poll()
    assert len(heard.of(0)) == 10 and not any(one.lost for one in attempt._ranks)


def test_a_start_that_takes_too_long_names_the_option_that_gives_more() -> None:
    run = Run(HELLO)
    run.script = replace(run.script, start_timeout_s=0.2)
    lost = Fault(lose="request")
    add_rule(run.cluster, lambda call: lost if call.actor == "process-1" else None)
    text = r"starting processes: waited 0.2 s, missing: .*process 1.*; `--start-timeout` changes"
    with pytest.raises(DeadlineExceeded, match=text):
        run.go()


def test_an_interruption_ends_all() -> None:
    run = Run(SLEEPING)
    once_all_are_heard(run, run.interrupt.set)
    with pytest.raises(Interrupted):
        run.go()
    assert len(run.heard.lines) == 3
    for _, text in run.heard.lines:
        assert gone(int(text.split()[1]))


def test_a_child_that_keeps_the_output_open_is_not_waited_for() -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '999']); print('done')"
    run = Run(code, nodes=["node-0"])
    run.go()
    assert run.heard.of(0) == ["done"]


@pytest.mark.timeout(40)
@pytest.mark.parametrize("command", ["no-such-command", "a\0b"])
def test_a_command_that_cannot_be_started(command: str) -> None:
    run = Run(HELLO)
    run.script = Script((command,), "run", None)
    with pytest.raises(ScriptFailed, match="cannot be started"):
        run.go()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_what_a_rank_leaves_running_ends_with_the_attempt(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    run = Run("", nodes=["node-0"])
    run.script = Script(("bash", "-c", DEAF.format(note=note, then="exit 0")), "run", None)
    assert run.go() == 0
    assert all(gone(pid) for pid in read(note))
