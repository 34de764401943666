"""Workers join and leave a run that goes on: no other is restarted, and no sample is lost."""

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
from counting import BATCH, SAMPLES, counting
from server_losses import undisturbed
from small_runs import HERE, distance, job, train, weights
from table_runs import tables

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
LASTS = 200
"""Steps of a synchronous run."""
EPOCHS = 80  # of four steps
PATIENCE_S = 60.0


class Story(Callback, threading.Thread):
    """Does something to a run from outside, then lets it end. A `Callback`."""

    def __init__(self, story: Callable[[RunName, "Story"], None], ends: Path) -> None:
        super().__init__(daemon=True)
        self.story, self.ends = story, ends
        self.training = threading.Event()
        self.step = 0
        self.failures: list[FailureEvent] = []
        self.recovered = threading.Event()
        self.errors: list[BaseException] = []

    def on_start(self, job: object, run: str, path: Path) -> None:
        self.start()

    def on_step(self, step: StepSummary) -> None:
        self.step = step.step
        self.training.set()

    def on_failure(self, failure: FailureEvent) -> None:
        self.failures.append(failure)

    def on_recovery(self, recovery: Recovery) -> None:
        self.recovered.set()

    def run(self) -> None:
        try:
            assert self.training.wait(PATIENCE_S)
            self.story(one_run("small"), self)
        except BaseException as error:
            self.errors.append(error)
        finally:
            self.ends.touch()


def wait_until(run: RunName, what: Callable[[Overview], bool]) -> Overview:
    until = time.monotonic() + PATIENCE_S
    while not what(seen := overview(run)):
        assert time.monotonic() < until, role_lines(seen)
        time.sleep(0.1)
    return seen


def made(seen: Overview) -> dict[int, int]:
    assert seen.scheduler is not None
    return {entry.stats.rank: entry.stats.made for entry in seen.scheduler.workers}


@pytest.mark.slow
def test_workers_join_leave_and_are_lost(tmp_path: Path) -> None:
    def story(run: RunName, mine: Story) -> None:
        before = wait_until(run, lambda seen: min(made(seen).values()) > 0)
        assert before.servers is not None and before.servers.version == 1
        assert [assignment.primary for assignment in before.servers.assignments] == ["server-0"]
        scale(run, 4, PATIENCE_S)
        seen = wait_until(run, lambda seen: min(made(seen).values()) > 0)
        assert sorted(made(seen)) == [0, 1, 2, 3]
        assert any(line.startswith("worker-3 ") for line in role_lines(seen))
        controller = run.actor("controller")
        with pytest.raises(SpecError, match="14 more workers need 7 CPU, of which"):
            ray.get(controller.scale.remote(18), timeout=PATIENCE_S)
        with pytest.raises(SpecError, match=r"must be 1 to 18 \(got 19\)"):
            scale(run, 19, PATIENCE_S)
        status = ray.get(controller.scale_status.remote(), timeout=PATIENCE_S)
        assert status == ScaleStatus(ScaleRequest(1, 4)), "what is refused leaves no trace"
        scale(run, 1, PATIENCE_S)
        scale(run, 2, PATIENCE_S)
        assert not mine.failures, "nobody was disturbed"
        wait_until(run, lambda seen: min(made(seen).values()) > 0)
        ray.kill(run.actor("worker-4"))
        assert mine.recovered.wait(PATIENCE_S)
        count = made(overview(run))
        wait_until(run, lambda seen: made(seen).get(4, 0) > count.get(4, 0) + 2)

    ends = tmp_path / "ends"
    watch = Story(story, ends)
    spec = job(
        {"name": "ps-async", "delay_compensation": 0.1},
        2,
        task="tasks_for_tests:Paced",
        task_args={"until": str(ends), "seconds": 0.1},
        optimizer={"name": "SGD", "lr": 1e-3},
        epochs=None,
        steps=STEPS,
        evaluation={"every_epochs": 0},
    )
    result = train(spec, tmp_path, callbacks=(watch,))
    watch.join(10)
    assert not watch.errors, watch.errors
    assert [failure.replaced for failure in watch.failures] == [("worker-4",)]
    steps = [summary.step for summary in result.history]
    assert (
        steps == sorted(set(steps)) and len(steps) > 0.9 * STEPS
    )  # reports are lost with a worker
    (log,) = read_logs(str(result.path / FILE_NAME))[0]
    assert log_flaws(log, 2, STEPS) == []
    assert {applied.rank for applied in log} == {0, 1, 2, 3, 4}
    assert command(["replay", str(result.path), "--working-dir", str(HERE)]) == 0


@pytest.mark.slow
def test_whoever_comes_and_goes_each_task_is_in_the_tables_once(tmp_path: Path) -> None:
    """The trained model counts gradients: of each sample one an epoch, in its row and elsewhere."""

    def story(run: RunName, mine: Story) -> None:
        wait_until(run, lambda seen: min(made(seen).values()) > 0)
        scale(run, 3, PATIENCE_S)
        wait_until(run, lambda seen: made(seen).get(2, 0) > 0)
        assert not mine.failures, "nobody was disturbed"
        for role in ("worker-1", "task-scheduler"):
            ray.kill(run.actor(role))
        assert mine.recovered.wait(PATIENCE_S)
        wait_until(run, lambda seen: seen.scheduler is not None and made(seen).get(1, 0) > 0)
        scale(run, 1, PATIENCE_S)

    ends = tmp_path / "ends"
    watch = Story(story, ends)
    given = {"until": str(ends), "seconds": 0.05}
    spec = counting(name="small", task="counting:Counting", task_args=given, epochs=100)
    spec["scaling"]["resources_per_worker"] = {"CPU": 0.5}
    result = train(spec, tmp_path, callbacks=(watch,))
    watch.join(10)
    assert not watch.errors, watch.errors
    lost = {role for failure in watch.failures for role in failure.replaced}
    assert lost == {"worker-1", "task-scheduler"}
    assert weights(result)[:SAMPLES].tolist() == [-100] * SAMPLES
    rows = tables(result)["rows"]
    assert rows[:, 0].tolist() == list(range(SAMPLES))
    assert set(rows[:, 1:].ravel()) == {-100}


def goes_on(mine: Story, run: RunName, workers: int) -> Overview:
    """Wait until some more steps are made, by so many workers."""
    step, until = mine.step, time.monotonic() + PATIENCE_S
    while mine.step < step + 5:
        assert time.monotonic() < until, role_lines(overview(run))
        time.sleep(0.05)
    seen = overview(run)
    assert seen.scheduler is not None
    assert (sorted(made(seen)), seen.scheduler.parts) == ([*range(workers)], workers)
    return seen


def kill_server(run: RunName, shard: int) -> None:
    """Kill the server of a shard; where it is kept twice, once its backup may take over."""

    def may_be_lost(seen: Overview) -> bool:
        assert seen.servers is not None
        return seen.servers.assignments[shard].ready or not seen.servers.replicated

    seen = wait_until(run, may_be_lost)
    assert seen.servers is not None
    manager = run.actor("server-manager")
    if seen.servers.replicated:
        joined = ray.get(manager.follow.remote(0, 0, 0, 1.0), timeout=PATIENCE_S)
        os.kill(joined.parameters[shard].pid, signal.SIGKILL)
    else:
        ray.kill(run.actor(seen.servers.assignments[shard].primary))


def synchronous(ends: Path, strategy: dict[str, Any], **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "task": "tasks_for_tests:Paced",
        "task_args": {"until": str(ends), "seconds": 0.04},
        "optimizer": {"name": "SGD", "lr": 0.02},
        "global_batch_size": 32,
        "clip_norm": 0.5,
        "epochs": None,
        "steps": LASTS,
        "evaluation": {"every_epochs": 100},
    }
    return job({"name": "ps-sync", **strategy}, 2, **{**fields, **more})


def resized(
    tmp_path: Path, story: Callable[[RunName, Story], None], **strategy: Any
) -> tuple[Result, Story]:
    """Train while the story goes on: every step is made once, and the model is the same."""
    ends = tmp_path / "ends"
    watch = Story(story, ends)
    spec = synchronous(ends, {"num_servers": 2, **strategy})
    result = train(spec, tmp_path, callbacks=(watch,))
    watch.join(10)
    assert not watch.errors, watch.errors
    assert [summary.step for summary in result.history] == list(range(1, LASTS + 1))
    # Sums are of other parts, so bits differ; and that is all.
    other = np.frombuffer(undisturbed(spec), np.float32)
    assert distance(weights(result), other) < 1e-5
    return result, watch


def short_steps(result: Result) -> set[int]:
    """Give the steps that have fewer samples than their batch."""
    size = Sampler(37, 32, 1).batch_size
    return {one.step for one in result.history if one.samples != size(one.step - 1)}


def test_a_synchronous_run_goes_on_with_more_and_fewer(tmp_path: Path) -> None:
    def story(run: RunName, mine: Story) -> None:
        first = run.actor("worker-0")
        scale(run, 3, PATIENCE_S)
        goes_on(mine, run, 3)
        scale(run, 1, PATIENCE_S)
        goes_on(mine, run, 1)
        assert run.actor("worker-0") == first

    result, watch = resized(tmp_path, story)
    assert not watch.failures, "nobody was disturbed"
    assert [(one.before, one.workers) for one in result.resizes] == [(2, 3), (3, 1)]
    assert not short_steps(result)


@pytest.mark.slow
def test_a_run_that_is_resized_loses_a_worker_and_a_server(tmp_path: Path) -> None:
    def story(run: RunName, mine: Story) -> None:
        first = [run.actor(f"worker-{rank}") for rank in range(2)]
        scale(run, 5, 0)  # and thought better of it
        scale(run, 4, PATIENCE_S)
        goes_on(mine, run, 4)
        with pytest.raises(SpecError, match="14 more workers need 7 CPU, of which"):
            scale(run, 18, PATIENCE_S)
        scale(run, 3, PATIENCE_S)
        goes_on(mine, run, 3)
        assert not mine.failures
        ray.kill(run.actor("worker-2"))
        assert mine.recovered.wait(PATIENCE_S)
        kill_server(run, 0)
        goes_on(mine, run, 3)
        assert [run.actor(f"worker-{rank}") for rank in range(2)] == first
        scale(run, 1, PATIENCE_S)
        scale(run, 1, PATIENCE_S)
        goes_on(mine, run, 1)
        assert run.actor("worker-0") == first[0]

    result, watch = resized(tmp_path, story, replication=2)
    assert [failure.replaced for failure in watch.failures] == [("worker-2",)]
    assert [(one.before, one.workers) for one in result.resizes] == [(2, 4), (4, 3), (3, 1)]
    lost = watch.failures[0].step
    told = set(range(lost - 19, lost + 1))
    assert short_steps(result) <= told, "but what a lost worker had not told"


@pytest.mark.slow
def test_after_going_back_there_are_as_many_workers_as_before(tmp_path: Path) -> None:
    def story(run: RunName, mine: Story) -> None:
        scale(run, 3, PATIENCE_S)
        goes_on(mine, run, 3)
        kill_server(run, 0)
        assert mine.recovered.wait(PATIENCE_S)
        goes_on(mine, run, 3)

    ends = tmp_path / "ends"
    watch = Story(story, ends)
    spec = synchronous(ends, {}, checkpoint={"every_steps": 5})
    result = train(spec, tmp_path, callbacks=(watch,))
    watch.join(10)
    assert not watch.errors, watch.errors
    assert [s.replaced for s in watch.failures] == [("worker-0", "worker-1", "worker-2")]
    assert watch.failures[0].step >= 5
    assert [summary.step for summary in result.history] == list(range(1, LASTS + 1))
    assert distance(weights(result), np.frombuffer(undisturbed(spec), np.float32)) < 1e-5


@pytest.mark.slow
def test_embedding_tables_follow_a_synchronous_run(tmp_path: Path) -> None:
    def story(run: RunName, mine: Story) -> None:
        scale(run, 3, PATIENCE_S)
        goes_on(mine, run, 3)
        ray.kill(run.actor("worker-1"))
        assert mine.recovered.wait(PATIENCE_S)
        goes_on(mine, run, 3)
        scale(run, 1, PATIENCE_S)
        goes_on(mine, run, 1)

    ends = tmp_path / "ends"
    watch = Story(story, ends)
    rule = {"name": "SGD", "lr": float(BATCH)}
    spec = job("ps-sync", 2) | counting(
        task="counting:Counting",
        task_args={"until": str(ends), "seconds": 0.03},
        strategy="ps-sync",
        scaling=job("ps-sync", 2)["scaling"],
        optimizer=rule,
        embeddings={"servers": 2, "optimizer": rule},
        epochs=EPOCHS,
        name="small",
    )
    result = train(spec, tmp_path, callbacks=(watch,))
    watch.join(10)
    assert not watch.errors, watch.errors
    assert [failure.replaced for failure in watch.failures] == [("worker-1",)]
    assert [(one.before, one.workers) for one in result.resizes] == [(2, 3), (3, 1)]
    assert (tables(result)["rows"][:, 1:] == -EPOCHS).all()
    assert (weights(result) == -EPOCHS).all()
