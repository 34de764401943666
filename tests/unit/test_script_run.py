"""Scripts in real processes, over a transport that can lose replies."""

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
from script_processes import IGNORES_SIGTERM, has_exited, read_pids

from distplat.actors import script_run
from distplat.actors.local_transport import Actor, LocalCluster
from distplat.actors.script_process import ProcessOutput, ScriptProcess
from distplat.actors.script_run import Attempt, Script, _Rank, run_script
from distplat.platform.errors import ActorLost, DeadlineExceeded, Interrupted, ScriptFailed
from distplat.platform.torchrun import ProcessLocation

NODES = ("node-0", "node-1", "node-0")
HELLO = "import os; print('hello from', os.environ['RANK'])"


class RecordingTerminal:
    """Record output lines and notices."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self.notices: list[str] = []

    def line(self, rank: int, text: str) -> None:
        self.lines.append((rank, text))

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def of(self, rank: int) -> list[str]:
        return [text for line_rank, text in self.lines if line_rank == rank]


class Run:
    """Run of a script whose actors are in this process."""

    def __init__(self, code: str, nodes: Sequence[str] = NODES, max_restarts: int = 0) -> None:
        command = ("python", "-c", code)
        self.script = Script(command, "run", None, max_restarts, start_timeout_s=20.0)
        self.nodes, self.terminal, self.cluster = nodes, RecordingTerminal(), LocalCluster()
        self.actors: list[Actor] = []
        self.interrupt = threading.Event()

    @contextmanager
    def spawn(self, attempt: int) -> Iterator[Sequence[Any]]:
        self.actors = []
        for index, node in enumerate(self.nodes):
            location = ProcessLocation(node, "127.0.0.1")
            body = ScriptProcess(lambda location=location: location)  # type: ignore[misc]
            self.actors.append(self.cluster.spawn(f"process-{index}", node, lambda _, b=body: b))  # type: ignore[misc]
        try:
            yield self.actors
        finally:
            for actor in self.actors:
                actor.die("the attempt is over")

    def check(self) -> None:
        if self.interrupt.is_set():
            raise Interrupted(2)

    def execute(self) -> int:
        transport = self.cluster.transport()
        return run_script(self.script, transport, self.spawn, self.terminal, self.check)


def test_output_of_each_rank_is_received_once() -> None:
    run = Run(HELLO)
    assert run.execute() == 0
    assert sorted(run.terminal.lines) == [(rank, f"hello from {rank}") for rank in range(3)]


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_lost_messages_neither_lose_nor_repeat_lines(lost: Any) -> None:
    run = Run("for n in range(300): print(n)")
    rng = random.Random(7)

    def rule(call: Call) -> Fault | None:
        return Fault(lose=lost) if rng.random() < 0.3 else None

    add_rule(run.cluster, rule)
    run.execute()
    for rank in range(3):
        assert run.terminal.of(rank) == [str(n) for n in range(300)]


def test_output_longer_than_buffer() -> None:
    run = Run("for n in range(30000): print(n)", nodes=["node-0"])
    run.execute()
    assert run.terminal.of(0) == [str(n) for n in range(30000)]


FAILING = """
import os, sys, time
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    print(f"pid {os.getpid()}", flush=True)
    sys.exit(3)
print(f"pid {os.getpid()}", flush=True)
time.sleep(999 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
"""


def test_first_failure_ends_all_ranks() -> None:
    run = Run(FAILING)
    with pytest.raises(ScriptFailed, match="rank 1 ended with exit code 3") as error:
        run.execute()
    assert error.value.exit_code == 1
    for _, text in run.terminal.lines:
        assert has_exited(int(text.split()[1]))


def test_failure_restarts_all_ranks() -> None:
    run = Run(FAILING, max_restarts=1)
    assert run.execute() == 1
    [notice] = run.terminal.notices
    assert "rank 1 ended with exit code 3" in notice
    assert "restart 1 of 1" in notice


def test_rank_that_ignores_sigterm_is_killed(
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
        run.execute()
    assert len(run.terminal.lines) == 2
    for _, text in run.terminal.lines:
        assert has_exited(int(text.split()[1]))


LEAVING = """
import os, sys, time
rank, until = os.environ["RANK"], time.monotonic() + 60
while rank == "0" and not os.path.exists({marker!r}) and time.monotonic() < until:
    time.sleep(0.01)
sys.exit(int(rank == "0"))
"""


def test_failure_names_ranks_that_exited_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Example: a rank leaves its loop, and another rank waits for it."""
    monkeypatch.setattr(script_run, "_NOTICE_S", 0.1)
    file = tmp_path / "marker"

    class TouchingTerminal(RecordingTerminal):
        def notice(self, text: str) -> None:
            super().notice(text)
            file.touch()

    run = Run(LEAVING.format(marker=str(file)), nodes=["node-0", "node-0"])
    run.terminal = TouchingTerminal()
    with pytest.raises(
        ScriptFailed, match=r"rank 0 ended .* 1; .* rank 1 had ended before, with 0"
    ):
        run.execute()
    [notice] = run.terminal.notices
    assert notice.startswith(
        "rank 1 ended with exit code 0, 0 s ago; still running, maybe waiting for them: rank 0"
    )


def test_error_names_signal() -> None:
    run = Run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", nodes=["node-0"])
    with pytest.raises(ScriptFailed, match=r"rank 0 was killed by SIGKILL; was it .*memory"):
        run.execute()


SLEEPING = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"


def after_all_ranks_print(run: Run, action: Callable[[], object]) -> None:
    """Run an action in a thread when three lines have been received."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + 40
        while len(run.terminal.lines) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    threading.Thread(target=wait_and_act, daemon=True).start()


def test_lost_process_is_named_and_other_ranks_end() -> None:
    run = Run(SLEEPING)
    after_all_ranks_print(run, lambda: run.actors[1].die("its node is gone"))
    # rank 2 runs on the second node
    with pytest.raises(ActorLost, match=r"the process of rank 2 was lost: .*its node is gone"):
        run.execute()
    assert len(run.terminal.lines) == 3
    for _, text in run.terminal.lines:
        assert has_exited(int(text.split()[1]))


def test_frozen_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by a second with each reply of another actor."""
    frozen, seconds = threading.Event(), [1.0]
    run = Run(SLEEPING)
    after_all_ranks_print(run, frozen.set)

    def rule(call: Call) -> Fault | None:
        if frozen.is_set() and call.actor == "process-0":
            seconds[0] += 1
        return Fault(delay_s=10.0) if frozen.is_set() and call.actor == "process-1" else None

    monkeypatch.setattr(script_run, "AwakeClock", lambda: SimpleNamespace(now=lambda: seconds[0]))
    monkeypatch.setattr(script_run, "_OUTPUT_S", 0.02)
    add_rule(run.cluster, rule)
    with pytest.raises(ActorLost, match=r"rank 2 was lost: it has not answered for 60 s"):
        run.execute()


def test_slow_terminal_does_not_make_ranks_unresponsive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of 70 ranks takes a second; rank 0 has a reply in every second poll."""
    seconds = [0.0]

    def advance_clock() -> float:
        seconds[0] += 1  # the most that `AwakeClock` counts between two readings
        return seconds[0]

    class AlternatingTransport:
        turn = 0

        def call(self, actor: int, *args: Any) -> int:
            return actor

        def wait(self, replies: list[int], limit_s: float, everything: bool = False) -> list[int]:
            return [reply for reply in replies if reply or self.turn % 2]

        def get(self, reply: int, limit_s: float) -> ProcessOutput:
            return ProcessOutput(("line",), None)

    monkeypatch.setattr(script_run, "AwakeClock", lambda: SimpleNamespace(now=advance_clock))
    transport: Any = AlternatingTransport()
    terminal = RecordingTerminal()
    attempt = Attempt(Script(("x",), "run", None), transport, [], terminal, lambda: None)
    attempt._ranks = [_Rank(rank, rank) for rank in range(70)]
    for transport.turn in range(20):
        attempt._poll()
    assert len(terminal.of(0)) == 10 and not any(rank.lost for rank in attempt._ranks)


def test_slow_start_names_the_option_for_its_deadline() -> None:
    run = Run(HELLO)
    run.script = replace(run.script, start_timeout_s=0.2)
    lost = Fault(lose="request")
    add_rule(run.cluster, lambda call: lost if call.actor == "process-1" else None)
    text = r"starting processes: waited 0.2 s, missing: .*process 1.*; `--start-timeout` changes"
    with pytest.raises(DeadlineExceeded, match=text):
        run.execute()


def test_interruption_ends_all_ranks() -> None:
    run = Run(SLEEPING)
    after_all_ranks_print(run, run.interrupt.set)
    with pytest.raises(Interrupted):
        run.execute()
    assert len(run.terminal.lines) == 3
    for _, text in run.terminal.lines:
        assert has_exited(int(text.split()[1]))


def test_does_not_wait_for_child_that_keeps_output_open() -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '999']); print('done')"
    run = Run(code, nodes=["node-0"])
    run.execute()
    assert run.terminal.of(0) == ["done"]


@pytest.mark.timeout(40)
@pytest.mark.parametrize("command", ["no-such-command", "a\0b"])
def test_command_that_cannot_be_started(command: str) -> None:
    run = Run(HELLO)
    run.script = Script((command,), "run", None)
    with pytest.raises(ScriptFailed, match="cannot be started"):
        run.execute()


@pytest.mark.skipif(sys.platform != "linux", reason="requires Linux")
def test_orphans_end_with_the_attempt(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    run = Run("", nodes=["node-0"])
    run.script = Script(
        ("bash", "-c", IGNORES_SIGTERM.format(note=note, then="exit 0")), "run", None
    )
    assert run.execute() == 0
    assert all(has_exited(pid) for pid in read_pids(note))
