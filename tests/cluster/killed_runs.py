"""Runs of many steps, and a thread that kills one of their actors."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from small_runs import BesideTraining, job

LONG_STEPS = {"epochs": None, "steps": 100_000, "evaluation": {"every_epochs": 0}}


def misbehaving_job(strategy: object, fault: str, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Return a long job of two ranks; one of them gets `fault` in its sixth step."""
    args = {"fault": fault, "marker": str(tmp_path / "done"), "at": 6}
    fields: dict[str, Any] = {
        "task": "tasks_for_tests:Misbehaving",
        "task_args": args,
        **LONG_STEPS,
    }
    more["failure"] = {"max_failures": 0, **more.get("failure", {})}
    return job(strategy, 2, **fields, **more)


class Killer(BesideTraining):
    """
    Sends a signal to the process of an actor after the first step. A `Callback`.

    Args:
        role: the actor's class.
        number: of the signal.
        when: condition to wait for.
    """

    def __init__(self, role: str, number: int, when: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.role, self.number, self.when = role, number, when
        self.killed_at = 0.0

    def run(self) -> None:
        assert self.training.wait(60)
        deadline = time.monotonic() + 60
        while not self.when():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            title = " ".join(process.cmdline()) if process.is_running() else ""
            if title.startswith("ray::") and self.role in title:
                os.kill(process.pid, self.number)
                self.killed_at = time.monotonic()
                return
        raise LookupError(f"no process of {self.role}")
