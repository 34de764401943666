"""Shards that are kept twice: server nodes die and freeze, and no acknowledged push is lost."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from marks import slow
from small_runs import HERE, job, train, weights

from distplat import Callback, Task
from distplat.cli.main import run as command
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs
from distplat.platform.progress import StepSummary
from distplat.platform.server_group import ShardAssignment

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

STEPS = 200
MOST_S = 60.0


class Losing(Callback, threading.Thread):
    """
    Sends signals to the primaries of shard 0, each when all backups are ready. A `Callback`.

    Args:
        done: a file to be made afterwards: the run may hurry.
        signals: one for each loss.
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
        assert self.training.wait(MOST_S)
        self.lose()
        self.done.touch()

    def lose(self, manager_name: str = "small/server-manager") -> None:
        """Send the signals."""
        manager = ray.get_actor(manager_name, namespace=self.run_name)
        for number in self.signals:
            self.lost.append(self._ready_assignment(manager).primary)
            address = ray.get(manager.follow.remote(0, 0, 0, 1.0), timeout=MOST_S).parameters[0]
            self.nodes.append(address.node)
            began = time.monotonic()
            os.kill(address.pid, number)
            self._standstill(began)

    def _ready_assignment(self, manager: Any) -> ShardAssignment:
        until = time.monotonic() + MOST_S
        while True:
            assignments: list[ShardAssignment] = ray.get(
                manager.assignments.remote(), timeout=MOST_S
            )
            if all(
                assignment.ready and assignment.primary not in self.lost
                for assignment in assignments
            ):
                return assignments[0]
            assert time.monotonic() < until, assignments
            time.sleep(0.05)

    def _standstill(self, began: float) -> None:
        until = time.monotonic() + MOST_S
        while time.monotonic() < until:
            later = [at for at in self._steps if at > began + 0.6]  # reported twice a second
            if later:
                self.standstills.append(later[0] - began)
                return
            time.sleep(0.02)


def long_job(
    strategy: dict[str, Any], done: Path, pace_s: float = 0.04, **more: Any
) -> dict[str, Any]:
    fields: dict[str, Any] = {"epochs": None, "steps": STEPS, "evaluation": {"every_epochs": 0}}
    task = {"task": "tasks_for_tests:Paced", "task_args": {"until": str(done), "seconds": pace_s}}
    return job({"replication": 2, **strategy}, 2, **fields, **task, **more)


def undisturbed(spec: dict[str, Any], task: type[Task] | None = None) -> bytes:
    from local_run import train as train_in_memory
    from tasks_for_tests import Blobs

    from distplat.strategies.catalog import make_job

    parameters = train_in_memory(make_job({**spec, "task_args": {}}), task or Blobs).parameters()
    return b"".join(parameters[name].numpy().tobytes() for name in sorted(parameters))


@pytest.mark.parametrize(
    ("losses", "pace_s", "strategy", "more"),
    [
        (1, 0.04, {"name": "ps-sync"}, {"optimizer": {"name": "AdamW", "lr": 0.01}}),
        # so long that servers change while the workers compute
        slow(1, 1.5, {"name": "ps-sync"}, {"optimizer": {"name": "AdamW", "lr": 0.01}}),
        # the primary, then the promoted one
        slow(2, 0.04, {"name": "ps-sync", "num_servers": 2}, {"clip_norm": 0.5}),
    ],
)
def test_killed_primaries_leave_the_bits_as_they_are(
    losses: int, pace_s: float, strategy: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    done = tmp_path / "done"
    losing = Losing(done, *[signal.SIGKILL] * losses)
    spec = long_job(strategy, done, pace_s, **more)
    result = train(spec, tmp_path, callbacks=(losing,))
    assert len(losing.standstills) == losses, "the run was over too soon"
    assert [summary.step for summary in result.history] == list(range(1, STEPS + 1))
    assert weights(result).tobytes() == undisturbed(spec)


@pytest.mark.slow
def test_asynchronous_runs_lose_no_update_and_can_be_made_again(tmp_path: Path) -> None:
    done = tmp_path / "done"
    losing = Losing(done, signal.SIGKILL)
    strategy = {"name": "ps-async", "staleness": 3, "delay_compensation": 0.5}
    result = train(long_job(strategy, done), tmp_path, callbacks=(losing,))
    assert len(losing.standstills) == 1, "the run was over too soon"
    (log,) = read_logs(str(result.path / FILE_NAME))[0]
    assert log_flaws(log, 2, STEPS) == []
    assert command(["replay", str(result.path), "--working-dir", str(HERE)]) == 0


@pytest.mark.slow
def test_a_frozen_primary_is_replaced(tmp_path: Path) -> None:
    done = tmp_path / "done"
    losing = Losing(done, signal.SIGSTOP)
    spec = long_job({"name": "ps-sync"}, done, failure={"heartbeat_timeout_s": 3})
    result = train(spec, tmp_path, callbacks=(losing,))
    assert len(losing.standstills) == 1, "the run was over too soon"
    assert weights(result).tobytes() == undisturbed(spec)
