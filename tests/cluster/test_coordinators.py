"""A lost server manager or task scheduler is replaced; no update is lost."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from server_losses import PrimaryKiller, unfailed_weights
from small_runs import HERE, job, train, weights

from distplat import Callback, Result
from distplat.cli.main import run as command
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs
from distplat.platform.progress import FailureEvent, Recovery, StepSummary

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(120)]

STEPS = 200
TIMEOUT_S = 60.0


class Disruption(Callback, threading.Thread):
    """
    Runs a function in a thread while a run trains. A `Callback`.

    Args:
        done: file to create afterwards, for `Paced`.
        do: called with the run's name, and a function that waits for the next recovery.
    """

    def __init__(self, done: Path, do: Callable[[str, Callable[[], None]], None]) -> None:
        super().__init__(daemon=True)
        self.done, self.do, self.finished = done, do, False
        self.training, self.recovered = threading.Event(), threading.Event()
        self.after_step: Callable[[Any], None] = lambda summary: None

    def on_start(self, job: Any, run: str, path: Path) -> None:
        self.run_name = run
        self.start()

    def on_step(self, step: StepSummary) -> None:
        self.training.set()
        self.after_step(step)

    def on_recovery(self, recovery: Recovery) -> None:
        self.recovered.set()

    def run(self) -> None:
        assert self.training.wait(TIMEOUT_S)
        self.do(self.run_name, self._wait)
        self.finished = True
        self.done.touch()

    def _wait(self) -> None:
        assert self.recovered.wait(TIMEOUT_S), "no recovery"
        self.recovered.clear()


def signal_to(role: str, number: int) -> None:
    """Send a signal to the only actor of this class."""
    (process,) = [
        child
        for child in psutil.Process().children(recursive=True)
        if " ".join(child.cmdline()).startswith(f"ray::{role}")
    ]
    os.kill(process.pid, number)


def spec(strategy: dict[str, Any], done: Path, **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"epochs": None, "steps": STEPS, "evaluation": {"every_epochs": 5}}
    task = {"task": "tasks_for_tests:Paced", "task_args": {"until": str(done), "seconds": 0.04}}
    return job(strategy, 2, **fields, **task, **more)


def replaced(result: Result) -> list[tuple[str, ...]]:
    return [f.replaced for f in result.failures if isinstance(f, FailureEvent)]


def assert_reported_once(result: Result) -> None:
    """Assert that each step and evaluation is reported once."""
    assert [summary.step for summary in result.history] == list(range(1, STEPS + 1))
    assert (
        len({evaluation.step for evaluation in result.evaluations}) == len(result.evaluations) == 8
    )


@pytest.mark.slow
def test_lost_manager_repeats_no_step(tmp_path: Path) -> None:
    """The manager is killed, then its replacement is frozen; there are no checkpoints."""

    def do(run: str, wait: Callable[[], None]) -> None:
        signal_to("ServerManager", signal.SIGKILL)
        wait()
        signal_to("ServerManager", signal.SIGSTOP)
        wait()

    disruption = Disruption(tmp_path / "done", do)
    limits = {"heartbeat_timeout_s": 5}
    fields = spec(
        {"name": "ps-sync", "num_servers": 2}, disruption.done, failure=limits, clip_norm=0.5
    )
    result = train(fields, tmp_path, callbacks=(disruption,))
    assert disruption.finished
    assert replaced(result) == [("server-manager",)] * 2
    assert_reported_once(result)
    assert weights(result).tobytes() == unfailed_weights(fields)


@pytest.mark.slow
def test_new_manager_promotes_backups(tmp_path: Path) -> None:
    killer = PrimaryKiller(tmp_path / "done", signal.SIGKILL, signal.SIGKILL)

    def do(run: str, wait: Callable[[], None]) -> None:
        manager = ray.get_actor("small/server-manager", namespace=run)
        deadline = time.monotonic() + TIMEOUT_S
        while not all(s.ready for s in ray.get(manager.assignments.remote(), timeout=TIMEOUT_S)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        signal_to("ServerManager", signal.SIGKILL)
        wait()
        killer.run_name = run
        killer.lose("small/server-manager/attempt-1")

    disruption = Disruption(tmp_path / "done", do)
    disruption.after_step = killer.on_step
    fields = spec({"name": "ps-sync", "num_servers": 2, "replication": 2}, disruption.done)
    result = train(fields, tmp_path, callbacks=(disruption,))
    assert disruption.finished
    assert killer.lost[0] == "server-0"
    assert len(set(killer.lost)) == 2, "the primary, then the promoted backup"
    assert replaced(result) == [("server-manager",)]
    assert_reported_once(result)
    assert weights(result).tobytes() == unfailed_weights(fields)


@pytest.mark.slow
def test_lost_task_scheduler_loses_no_task(tmp_path: Path) -> None:
    def do(run: str, wait: Callable[[], None]) -> None:
        signal_to("Scheduler", signal.SIGKILL)
        wait()

    disruption = Disruption(tmp_path / "done", do)
    fields = spec({"name": "ps-async", "num_servers": 1, "staleness": 3}, disruption.done)
    result = train(fields, tmp_path, callbacks=(disruption,))
    assert disruption.finished
    assert replaced(result) == [("task-scheduler",)]
    assert_reported_once(result)
    (log,) = read_logs(str(result.path / FILE_NAME))[0]
    assert log_flaws(log, 2, STEPS) == []
    assert command(["replay", str(result.path), "--working-dir", str(HERE)]) == 0
