"""Workers join and leave a running job: no other worker is restarted, no sample is lost."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from counting import BATCH, SAMPLES, counting_fields
from server_losses import unfailed_weights
from small_runs import HERE, distance, job, train, weights
from table_runs import read_tables

from distplat import Callback, Result
from distplat.actors.overview import Overview, RunName, one_run, overview, scale
from distplat.cli.main import run as command
from distplat.cli.running import role_lines
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs
from distplat.platform.errors import SpecError
from distplat.platform.progress import FailureEvent, Recovery, StepSummary
from distplat.platform.sampler import Sampler
from distplat.platform.scaling import ScaleRequest, ScaleStatus

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(180)]

STEPS = 1000
SYNCHRONOUS_STEPS = 200
"""Steps of a synchronous run."""
EPOCHS = 80  # of four steps
TIMEOUT_S = 60.0


class Scenario(Callback, threading.Thread):
    """Runs a function in a thread while a run trains, then lets the run end. A `Callback`."""

    def __init__(self, scenario: Callable[[RunName, "Scenario"], None], done: Path) -> None:
        super().__init__(daemon=True)
        self.scenario, self.done = scenario, done
        self.training = threading.Event()
        self.step = 0
        self.failures: list[FailureEvent] = []
        self.recovered = threading.Event()
        self.errors: list[BaseException] = []

    def on_start(self, job: object, run: str, path: Path) -> None:
        self.start()

    def check(self) -> None:
        """Assert that the function has returned."""
        self.join(10)
        assert not self.errors, self.errors
        assert not self.is_alive(), "the run ended before the scenario"

    def on_step(self, step: StepSummary) -> None:
        self.step = step.step
        self.training.set()

    def on_failure(self, failure: FailureEvent) -> None:
        self.failures.append(failure)

    def on_recovery(self, recovery: Recovery) -> None:
        self.recovered.set()

    def run(self) -> None:
        try:
            assert self.training.wait(TIMEOUT_S)
            self.scenario(one_run("small"), self)
        except BaseException as error:
            self.errors.append(error)
        finally:
            self.done.touch()


def wait_until(run: RunName, condition: Callable[[Overview], bool]) -> Overview:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition(seen := overview(run)):
        assert time.monotonic() < deadline, role_lines(seen)
        time.sleep(0.1)
    return seen


def tasks_by_rank(seen: Overview) -> dict[int, int]:
    """Return the number of completed tasks of each rank."""
    assert seen.scheduler is not None
    return {entry.stats.rank: entry.stats.made for entry in seen.scheduler.workers}


@pytest.mark.slow
def test_workers_join_leave_and_are_lost(tmp_path: Path) -> None:
    def scenario(run: RunName, thread: Scenario) -> None:
        before = wait_until(run, lambda seen: min(tasks_by_rank(seen).values()) > 0)
        assert before.servers is not None and before.servers.version == 1
        assert [assignment.primary for assignment in before.servers.assignments] == ["server-0"]
        scale(run, 4, TIMEOUT_S)
        seen = wait_until(run, lambda seen: min(tasks_by_rank(seen).values()) > 0)
        assert sorted(tasks_by_rank(seen)) == [0, 1, 2, 3]
        assert any(line.startswith("worker-3 ") for line in role_lines(seen))
        controller = run.actor("controller")
        with pytest.raises(SpecError, match="14 more workers need 7 CPU, of which"):
            ray.get(controller.scale.remote(18), timeout=TIMEOUT_S)
        with pytest.raises(SpecError, match=r"must be 1 to 18 \(got 19\)"):
            scale(run, 19, TIMEOUT_S)
        status = ray.get(controller.scale_status.remote(), timeout=TIMEOUT_S)
        assert status == ScaleStatus(ScaleRequest(1, 4)), "a refused request is not recorded"
        scale(run, 1, TIMEOUT_S)
        scale(run, 2, TIMEOUT_S)
        assert not thread.failures, "no worker was lost"
        wait_until(run, lambda seen: min(tasks_by_rank(seen).values()) > 0)
        ray.kill(run.actor("worker-4"))
        assert thread.recovered.wait(TIMEOUT_S)
        count = tasks_by_rank(overview(run))
        wait_until(run, lambda seen: tasks_by_rank(seen).get(4, 0) > count.get(4, 0) + 2)

    done = tmp_path / "ends"
    thread = Scenario(scenario, done)
    spec = job(
        {"name": "ps-async", "delay_compensation": 0.1},
        2,
        task="tasks_for_tests:Paced",
        task_args={"until": str(done), "seconds": 0.1},
        optimizer={"name": "SGD", "lr": 1e-3},
        epochs=None,
        steps=STEPS,
        evaluation={"every_epochs": 0},
    )
    result = train(spec, tmp_path, callbacks=(thread,))
    thread.check()
    assert [failure.replaced for failure in thread.failures] == [("worker-4",)]
    steps = [summary.step for summary in result.history]
    assert (
        steps == sorted(set(steps)) and len(steps) > 0.9 * STEPS
    )  # reports are lost with a worker
    (log,) = read_logs(str(result.path / FILE_NAME))[0]
    assert log_flaws(log, 2, STEPS) == []
    assert {applied.rank for applied in log} == {0, 1, 2, 3, 4}
    assert command(["replay", str(result.path), "--working-dir", str(HERE)]) == 0


@pytest.mark.slow
def test_each_task_is_applied_to_the_tables_once(tmp_path: Path) -> None:
    """The model counts one gradient per sample and epoch, in tables and parameters."""

    def scenario(run: RunName, thread: Scenario) -> None:
        wait_until(run, lambda seen: min(tasks_by_rank(seen).values()) > 0)
        scale(run, 3, TIMEOUT_S)
        wait_until(run, lambda seen: tasks_by_rank(seen).get(2, 0) > 0)
        assert not thread.failures, "no worker was lost"
        for role in ("worker-1", "task-scheduler"):
            ray.kill(run.actor(role))
        assert thread.recovered.wait(TIMEOUT_S)
        wait_until(
            run, lambda seen: seen.scheduler is not None and tasks_by_rank(seen).get(1, 0) > 0
        )
        scale(run, 1, TIMEOUT_S)

    done = tmp_path / "ends"
    thread = Scenario(scenario, done)
    task_args = {"until": str(done), "seconds": 0.05}
    spec = counting_fields(name="small", task="counting:Counting", task_args=task_args, epochs=100)
    spec["scaling"]["resources_per_worker"] = {"CPU": 0.5}
    result = train(spec, tmp_path, callbacks=(thread,))
    thread.check()
    lost = {role for failure in thread.failures for role in failure.replaced}
    assert lost == {"worker-1", "task-scheduler"}
    assert weights(result)[:SAMPLES].tolist() == [-100] * SAMPLES
    rows = read_tables(result)["rows"]
    assert rows[:, 0].tolist() == list(range(SAMPLES))
    assert set(rows[:, 1:].ravel()) == {-100}


def wait_for_progress(thread: Scenario, run: RunName, workers: int) -> Overview:
    """Wait until `workers` workers have computed five more steps."""
    step, deadline = thread.step, time.monotonic() + TIMEOUT_S
    while thread.step < step + 5:
        assert time.monotonic() < deadline, role_lines(overview(run))
        time.sleep(0.05)
    seen = overview(run)
    assert seen.scheduler is not None
    assert (sorted(tasks_by_rank(seen)), seen.scheduler.parts) == ([*range(workers)], workers)
    return seen


def kill_server(run: RunName, shard: int) -> None:
    """Kill the server of a shard; with replication, once its backup is ready."""

    def may_be_lost(seen: Overview) -> bool:
        assert seen.servers is not None
        return seen.servers.assignments[shard].ready or not seen.servers.replicated

    seen = wait_until(run, may_be_lost)
    assert seen.servers is not None
    manager = run.actor("server-manager")
    if seen.servers.replicated:
        joined = ray.get(manager.follow.remote(0, 0, 0, 1.0), timeout=TIMEOUT_S)
        os.kill(joined.parameters[shard].pid, signal.SIGKILL)
    else:
        ray.kill(run.actor(seen.servers.assignments[shard].primary))


def synchronous_job(done: Path, strategy: dict[str, Any], **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "task": "tasks_for_tests:Paced",
        "task_args": {"until": str(done), "seconds": 0.04},
        "optimizer": {"name": "SGD", "lr": 0.02},
        "global_batch_size": 32,
        "clip_norm": 0.5,
        "epochs": None,
        "steps": SYNCHRONOUS_STEPS,
        "evaluation": {"every_epochs": 100},
    }
    return job({"name": "ps-sync", **strategy}, 2, **{**fields, **more})


def train_resized(
    tmp_path: Path, scenario: Callable[[RunName, Scenario], None], **strategy: Any
) -> tuple[Result, Scenario]:
    """Train during a scenario; assert that each step is reported once, and compare the model."""
    done = tmp_path / "ends"
    thread = Scenario(scenario, done)
    spec = synchronous_job(done, {"num_servers": 2, **strategy})
    result = train(spec, tmp_path, callbacks=(thread,))
    thread.check()
    assert [summary.step for summary in result.history] == list(range(1, SYNCHRONOUS_STEPS + 1))
    # Gradients are sums of other parts, so only the last bits differ.
    other = np.frombuffer(unfailed_weights(spec), np.float32)
    assert distance(weights(result), other) < 1e-5
    return result, thread


def short_steps(result: Result) -> set[int]:
    """Return the steps with fewer samples than their batch."""
    size = Sampler(37, 32, 1).batch_size
    return {s.step for s in result.history if s.samples != size(s.step - 1)}


def test_synchronous_run_grows_and_shrinks(tmp_path: Path) -> None:
    def scenario(run: RunName, thread: Scenario) -> None:
        first = run.actor("worker-0")
        scale(run, 3, TIMEOUT_S)
        wait_for_progress(thread, run, 3)
        scale(run, 1, TIMEOUT_S)
        wait_for_progress(thread, run, 1)
        assert run.actor("worker-0") == first

    result, thread = train_resized(tmp_path, scenario)
    assert not thread.failures, "no worker was lost"
    assert [(r.before, r.workers) for r in result.resizes] == [(2, 3), (3, 1)]
    assert not short_steps(result)


@pytest.mark.slow
def test_resized_run_loses_a_worker_and_a_server(tmp_path: Path) -> None:
    def scenario(run: RunName, thread: Scenario) -> None:
        first = [run.actor(f"worker-{rank}") for rank in range(2)]
        scale(run, 5, 0)  # replaced by the next request
        scale(run, 4, TIMEOUT_S)
        wait_for_progress(thread, run, 4)
        with pytest.raises(SpecError, match="14 more workers need 7 CPU, of which"):
            scale(run, 18, TIMEOUT_S)
        scale(run, 3, TIMEOUT_S)
        wait_for_progress(thread, run, 3)
        assert not thread.failures
        ray.kill(run.actor("worker-2"))
        assert thread.recovered.wait(TIMEOUT_S)
        kill_server(run, 0)
        wait_for_progress(thread, run, 3)
        assert [run.actor(f"worker-{rank}") for rank in range(2)] == first
        scale(run, 1, TIMEOUT_S)
        scale(run, 1, TIMEOUT_S)
        wait_for_progress(thread, run, 1)
        assert run.actor("worker-0") == first[0]

    result, thread = train_resized(tmp_path, scenario, replication=2)
    assert [failure.replaced for failure in thread.failures] == [("worker-2",)]
    assert [(r.before, r.workers) for r in result.resizes] == [(2, 4), (4, 3), (3, 1)]
    lost = thread.failures[0].step
    unreported = set(range(lost - 19, lost + 1))
    assert short_steps(result) <= unreported, "only reports of the lost worker are missing"


@pytest.mark.slow
def test_rollback_keeps_the_number_of_workers(tmp_path: Path) -> None:
    def scenario(run: RunName, thread: Scenario) -> None:
        scale(run, 3, TIMEOUT_S)
        wait_for_progress(thread, run, 3)
        kill_server(run, 0)
        assert thread.recovered.wait(TIMEOUT_S)
        wait_for_progress(thread, run, 3)

    done = tmp_path / "ends"
    thread = Scenario(scenario, done)
    spec = synchronous_job(done, {}, checkpoint={"every_steps": 5})
    result = train(spec, tmp_path, callbacks=(thread,))
    thread.check()
    assert [s.replaced for s in thread.failures] == [("worker-0", "worker-1", "worker-2")]
    assert thread.failures[0].step >= 5
    assert [summary.step for summary in result.history] == list(range(1, SYNCHRONOUS_STEPS + 1))
    assert distance(weights(result), np.frombuffer(unfailed_weights(spec), np.float32)) < 1e-5


@pytest.mark.slow
def test_embedding_tables_of_a_resized_synchronous_run(tmp_path: Path) -> None:
    def scenario(run: RunName, thread: Scenario) -> None:
        scale(run, 3, TIMEOUT_S)
        wait_for_progress(thread, run, 3)
        ray.kill(run.actor("worker-1"))
        assert thread.recovered.wait(TIMEOUT_S)
        wait_for_progress(thread, run, 3)
        scale(run, 1, TIMEOUT_S)
        wait_for_progress(thread, run, 1)

    done = tmp_path / "ends"
    thread = Scenario(scenario, done)
    optimizer = {"name": "SGD", "lr": float(BATCH)}
    spec = job("ps-sync", 2) | counting_fields(
        task="counting:Counting",
        task_args={"until": str(done), "seconds": 0.03},
        strategy="ps-sync",
        scaling=job("ps-sync", 2)["scaling"],
        optimizer=optimizer,
        embeddings={"servers": 2, "optimizer": optimizer},
        epochs=EPOCHS,
        name="small",
    )
    result = train(spec, tmp_path, callbacks=(thread,))
    thread.check()
    assert [failure.replaced for failure in thread.failures] == [("worker-1",)]
    assert [(r.before, r.workers) for r in result.resizes] == [(2, 3), (3, 1)]
    assert (read_tables(result)["rows"][:, 1:] == -EPOCHS).all()
    assert (weights(result) == -EPOCHS).all()
