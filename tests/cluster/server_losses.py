"""Losses of server nodes during a run, and the model of the same run without a loss."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import ray
from small_runs import job

from distplat import Callback, Task
from distplat.platform.progress import StepSummary
from distplat.platform.server_group import ShardAssignment

STEPS = 200
TIMEOUT_S = 60.0


class PrimaryKiller(Callback, threading.Thread):
    """
    Sends signals to the primaries of shard 0, once all backups are ready. A `Callback`.

    Args:
        done: file to create afterwards, for `Paced`.
        signals: one per loss.
    """

    def __init__(self, done: Path, *signals: int) -> None:
        super().__init__(daemon=True)
        self.done, self.signals = done, signals
        self.training = threading.Event()
        self.lost: list[str] = []
        self.nodes: list[str] = []
        self.standstills: list[float] = []
        self._steps: list[float] = []

    def on_start(self, job: Any, run: str, path: Path) -> None:
        self.run_name = run
        self.start()

    def on_step(self, step: StepSummary) -> None:
        self._steps.append(time.monotonic())
        self.training.set()

    def run(self) -> None:
        assert self.training.wait(TIMEOUT_S)
        self.lose()
        self.done.touch()

    def lose(self, manager_name: str = "small/server-manager") -> None:
        """Send the signals."""
        manager = ray.get_actor(manager_name, namespace=self.run_name)
        for number in self.signals:
            self.lost.append(self._ready_assignment(manager).primary)
            address = ray.get(manager.follow.remote(0, 0, 0, 1.0), timeout=TIMEOUT_S).parameters[0]
            self.nodes.append(address.node)
            start = time.monotonic()
            os.kill(address.pid, number)
            self._measure_standstill(start)

    def _ready_assignment(self, manager: Any) -> ShardAssignment:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            assignments: list[ShardAssignment] = ray.get(
                manager.assignments.remote(), timeout=TIMEOUT_S
            )
            if all(
                assignment.ready and assignment.primary not in self.lost
                for assignment in assignments
            ):
                return assignments[0]
            assert time.monotonic() < deadline, assignments
            time.sleep(0.05)

    def _measure_standstill(self, start: float) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            later = [
                time_s for time_s in self._steps if time_s > start + 0.6
            ]  # two reports a second
            if later:
                self.standstills.append(later[0] - start)
                return
            time.sleep(0.02)


def long_job(
    strategy: dict[str, Any], done: Path, pace_s: float = 0.04, **more: Any
) -> dict[str, Any]:
    fields: dict[str, Any] = {"epochs": None, "steps": STEPS, "evaluation": {"every_epochs": 0}}
    task = {"task": "tasks_for_tests:Paced", "task_args": {"until": str(done), "seconds": pace_s}}
    return job({"replication": 2, **strategy}, 2, **fields, **task, **more)


def unfailed_weights(spec: dict[str, Any], task: type[Task] | None = None) -> bytes:
    """Train in memory without a failure; return the bytes of the model."""
    from local_run import train as train_in_memory
    from tasks_for_tests import Blobs

    from distplat.strategies.catalog import make_job

    parameters = train_in_memory(make_job({**spec, "task_args": {}}), task or Blobs).parameters()
    return b"".join(parameters[name].numpy().tobytes() for name in sorted(parameters))
