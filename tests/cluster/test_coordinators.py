"""The server manager and the task scheduler die: nothing that was learnt is lost with them."""

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
from server_losses import Losing, undisturbed
from small_runs import HERE, job, train, weights

from distplat import Callback, Result
from distplat.cli.main import run as command
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs
from distplat.platform.progress import FailureEvent, Recovery, StepSummary

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(120)]

STEPS = 200
MOST_S = 60.0


class Deeds(Callback, threading.Thread):
    """
    Does something while a run trains, then lets it hurry. A `Callback`.

    Args:
        done: a file to be made afterwards.
        do: is given the run's name, and something that waits for the next recovery.
    """

    def __init__(self, done: Path, do: Callable[[str, Callable[[], None]], None]) -> None:
        super().__init__(daemon=True)
        self.done, self.do, self.finished = done, do, False
        self.training, self.recovered = threading.Event(), threading.Event()
        self.heard: Callable[[Any], None] = lambda summary: None

    def on_start(self, job: Any, run: str, path: Path) -> None:
        self.run_name = run
        self.start()

    def on_step(self, step: StepSummary) -> None:
        self.training.set()
        self.heard(step)

    def on_recovery(self, recovery: Recovery) -> None:
        self.recovered.set()

    def run(self) -> None:
        assert self.training.wait(MOST_S)
        self.do(self.run_name, self._wait)
        self.finished = True
        self.done.touch()

    def _wait(self) -> None:
        assert self.recovered.wait(MOST_S), "it did not go on"
        self.recovered.clear()


def signal_to(role: str, number: int) -> None:
    """Send a signal to the only actor of this class."""
    (process,) = [
        one
        for one in psutil.Process().children(recursive=True)
        if " ".join(one.cmdline()).startswith(f"ray::{role}")
    ]
    os.kill(process.pid, number)


def spec(strategy: dict[str, Any], done: Path, **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"epochs": None, "steps": STEPS, "evaluation": {"every_epochs": 5}}
    task = {"task": "tasks_for_tests:Paced", "task_args": {"until": str(done), "seconds": 0.04}}
    return job(strategy, 2, **fields, **task, **more)


def replaced(result: Result) -> list[tuple[str, ...]]:
    return [one.replaced for one in result.failures if isinstance(one, FailureEvent)]


def told_once(result: Result) -> None:
    assert [summary.step for summary in result.history] == list(range(1, STEPS + 1))
    assert len({one.step for one in result.evaluations}) == len(result.evaluations) == 8


@pytest.mark.slow
def test_a_lost_manager_costs_no_step(tmp_path: Path) -> None:
    """Killed, then its successor frozen; there is no checkpoint to go back to."""

    def do(run: str, wait: Callable[[], None]) -> None:
        signal_to("ServerManager", signal.SIGKILL)
        wait()
        signal_to("ServerManager", signal.SIGSTOP)
        wait()

    deeds = Deeds(tmp_path / "done", do)
    limits = {"heartbeat_timeout_s": 5}
    given = spec({"name": "ps-sync", "num_servers": 2}, deeds.done, failure=limits, clip_norm=0.5)
    result = train(given, tmp_path, callbacks=(deeds,))
    assert deeds.finished
    assert replaced(result) == [("server-manager",)] * 2
    told_once(result)
    assert weights(result).tobytes() == undisturbed(given)


@pytest.mark.slow
def test_a_new_manager_promotes_backups_as_the_old_one_would(tmp_path: Path) -> None:
    losing = Losing(tmp_path / "done", signal.SIGKILL, signal.SIGKILL)

    def do(run: str, wait: Callable[[], None]) -> None:
        manager = ray.get_actor("small/server-manager", namespace=run)
        until = time.monotonic() + MOST_S
        while not all(s.ready for s in ray.get(manager.assignments.remote(), timeout=MOST_S)):
            assert time.monotonic() < until
            time.sleep(0.05)
        signal_to("ServerManager", signal.SIGKILL)
        wait()
        losing.run_name = run
        losing.lose("small/server-manager/attempt-1")

    deeds = Deeds(tmp_path / "done", do)
    deeds.heard = losing.on_step
    given = spec({"name": "ps-sync", "num_servers": 2, "replication": 2}, deeds.done)
    result = train(given, tmp_path, callbacks=(deeds,))
    assert deeds.finished
    assert losing.lost[0] == "server-0"
    assert len(set(losing.lost)) == 2, "the primary, then the promoted one"
    assert replaced(result) == [("server-manager",)]
    told_once(result)
    assert weights(result).tobytes() == undisturbed(given)


@pytest.mark.slow
def test_a_lost_task_scheduler_costs_no_task(tmp_path: Path) -> None:
    def do(run: str, wait: Callable[[], None]) -> None:
        signal_to("Scheduler", signal.SIGKILL)
        wait()

    deeds = Deeds(tmp_path / "done", do)
    given = spec({"name": "ps-async", "num_servers": 1, "staleness": 3}, deeds.done)
    result = train(given, tmp_path, callbacks=(deeds,))
    assert deeds.finished
    assert replaced(result) == [("task-scheduler",)]
    told_once(result)
    (log,) = read_logs(str(result.path / FILE_NAME))[0]
    assert log_flaws(log, 2, STEPS) == []
    assert command(["replay", str(result.path), "--working-dir", str(HERE)]) == 0
