"""A failure raises a typed error that names the failed role, within its deadline."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from killed_runs import LONG_STEPS, Killer, misbehaving_job
from marks import slow
from small_runs import HERE, job, train

from distplat import Callback
from distplat.actors import ray_compat
from distplat.actors.messages import rendezvous_key
from distplat.platform.checkpoints import Catalogue
from distplat.platform.errors import (
    ActorLost,
    CollectiveError,
    DeadlineExceeded,
    Interrupted,
    UserCodeError,
)
from distplat.platform.progress import StepSummary

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


@pytest.mark.parametrize("strategy", ["ring", slow("ps-sync")])
def test_user_exception_on_one_rank_ends_the_run(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(UserCodeError) as caught:
        train(misbehaving_job(strategy, "raise", tmp_path), tmp_path)
    error = caught.value
    assert error.step == 6
    assert error.rank in (0, 1)
    assert "no such token: 17" in error.summary
    first = error.traceback.splitlines()[1]
    assert "tasks_for_tests.py" in first, "the traceback starts in the user's file"
    assert "FAILED" in next(tmp_path.rglob("result.json")).read_text()


@pytest.mark.slow
def test_user_exit_is_not_success(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="SystemExit"):
        train(misbehaving_job("ring", "exit", tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_killed_worker_is_named(strategy: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ActorLost, match=r"worker-\d was lost after step \d+"):
        train(misbehaving_job(strategy, "kill", tmp_path), tmp_path)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_killed_server_is_named(tmp_path: Path) -> None:
    killer = Killer("ServerNode", signal.SIGKILL)
    spec = job({"name": "ps-sync", "num_servers": 2}, 2, **LONG_STEPS)
    with pytest.raises(ActorLost, match="server"):
        train(spec, tmp_path, callbacks=(killer,))
    assert time.monotonic() - killer.killed_at < 15


@pytest.mark.slow
def test_killed_controller_ends_the_run_and_can_be_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All actors of controller and driver end; the leak check finds remaining ones."""

    def two_checkpoints() -> bool:  # the first one is complete
        return len(list(tmp_path.rglob("checkpoints/*/model.safetensors"))) > 1

    killer = Killer("ControllerActor", signal.SIGKILL, two_checkpoints)
    spec = job("ps-sync", 2, checkpoint={"every_steps": 5}, **LONG_STEPS)
    with pytest.raises(ActorLost, match=r"controller was lost after step \d+.*--resume") as caught:
        train(spec, tmp_path, callbacks=(killer,))
    assert caught.value.exit_code == 4
    logs = [r.args for r in caplog.records if str(r.msg).startswith("Ray's own logs are in")]
    assert [Path(*map(str, folder), "raylet.out").is_file() for folder in logs if folder] == [True]
    (folder,) = tmp_path.rglob("checkpoints")
    saved = Catalogue(folder).newest(lambda *message: None)
    assert saved is not None and saved.step > 0
    resumed = train({**spec, "steps": saved.step + 3}, tmp_path, resume=folder.parent)
    assert [summary.step for summary in resumed.history][-1] == saved.step + 3


def test_killed_driver_ends_all_actors(tmp_path: Path) -> None:
    """Also the actor created by the controller; the leak check finds remaining ones."""
    spec = misbehaving_job("ring", "kill", tmp_path, failure={"max_failures": 1})
    (tmp_path / "job.yaml").write_text(json.dumps({**spec, "storage_path": str(tmp_path)}))
    address = ray.get_runtime_context().gcs_address
    submit = ["-m", "distplat.cli.main", "submit", str(tmp_path / "job.yaml"), "--working-dir"]
    driver = subprocess.Popen([sys.executable, *submit, str(HERE), "--address", address])
    deadline = time.monotonic() + 90
    while not any("recovery" in file.read_text() for file in tmp_path.rglob("metrics.jsonl")):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    driver.kill()
    assert driver.wait(10) == -signal.SIGKILL
    (folder,) = (file.parent for file in tmp_path.rglob("metrics.jsonl"))
    ray_compat.delete_all(rendezvous_key(folder.name))  # as the driver does at the end of a run


@pytest.mark.parametrize("strategy", [{"name": "ring", "timeout_s": 2}, slow("ps-sync")])
def test_frozen_worker_is_named(strategy: object, tmp_path: Path) -> None:
    failure = {"step_timeout_s": 3, "heartbeat_timeout_s": 60}
    with pytest.raises((CollectiveError, DeadlineExceeded)) as caught:
        train(misbehaving_job(strategy, "stop", tmp_path, failure=failure), tmp_path)
    error = caught.value
    assert isinstance(error, CollectiveError | DeadlineExceeded)
    assert error.missing in ((0,), (1,), ("worker-0",), ("worker-1",))


@pytest.mark.slow
def test_worker_that_does_not_answer_polls_is_lost(tmp_path: Path) -> None:
    failure = {"step_timeout_s": 60, "heartbeat_timeout_s": 2}
    with pytest.raises(ActorLost, match=r"worker-\d was lost.*not answered for \d s"):
        train(misbehaving_job("ps-sync", "stop", tmp_path, failure=failure), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{"name": "ring", "timeout_s": 4}, "ps-sync"])
def test_slow_start_is_not_a_failure(strategy: object, tmp_path: Path) -> None:
    args = {"marker": str(tmp_path / "done"), "seconds": 6}
    spec = job(strategy, 2, task="tasks_for_tests:SlowStart", task_args=args)
    result = train({**spec, "failure": {"step_timeout_s": 4}}, tmp_path)
    assert (tmp_path / "done").exists()
    assert not result.failures
    assert len(result.history) == 15


class Hog:
    """Reserves the cluster's CPUs until it is killed."""

    def ping(self) -> None:
        pass


class Release(Callback):
    """Kills an actor five seconds after the start of the run. A `Callback`."""

    def __init__(self, actor: Any) -> None:
        self.timer = threading.Timer(5, ray.kill, [actor])

    def on_start(self, job: object, run: str, path: Path) -> None:
        self.timer.start()


@pytest.mark.slow
def test_run_waits_for_free_cpus(tmp_path: Path) -> None:
    hog = ray.remote(Hog).options(num_cpus=8).remote()
    ray.get(hog.ping.remote(), timeout=30)
    release = Release(hog)
    failure = {"heartbeat_timeout_s": 2}
    result = train(job("ps-sync", 2, failure=failure), tmp_path, callbacks=(release,))
    release.timer.join(10)
    assert not result.failures
    assert len(result.history) == 15


@pytest.mark.slow
def test_missing_workers_are_named(tmp_path: Path) -> None:
    hog = ray.remote(Hog).options(num_cpus=8).remote()
    ray.get(hog.ping.remote(), timeout=30)
    with pytest.raises(DeadlineExceeded, match=r"missing: worker-0, worker-1; .*start_timeout_s"):
        train(job("ring", 2, failure={"start_timeout_s": 3}), tmp_path)
    ray.kill(hog)


@pytest.mark.slow
def test_endless_user_code_is_named(tmp_path: Path) -> None:
    spec = misbehaving_job("ring", "hang", tmp_path, failure={"step_timeout_s": 2})
    spec["scaling"] = {"num_workers": 1}
    with pytest.raises(DeadlineExceeded, match="worker-0"):
        train(spec, tmp_path)


class Signaller(Callback):
    """Sends a signal to this process after the first step. A `Callback`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step(self, step: StepSummary) -> None:
        if self.number:
            os.kill(os.getpid(), self.number)
            self.number = 0


class DoubleInterrupt(Killer):
    """Freezes the controller, so that the shutdown hangs; then sends SIGINT twice."""

    def __init__(self) -> None:
        super().__init__("ControllerActor", signal.SIGSTOP)

    def run(self) -> None:
        super().run()
        for _ in range(2):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)
        self.killed_at = time.monotonic()


def test_second_ctrl_c_does_not_wait_for_shutdown(tmp_path: Path) -> None:
    """Ray keeps running, as in a notebook; the leak check finds remaining actors."""
    interrupt = DoubleInterrupt()
    with pytest.raises(Interrupted) as caught:
        train(job("ring", 2, **LONG_STEPS), tmp_path, callbacks=(interrupt,))
    assert time.monotonic() - interrupt.killed_at < 5
    assert caught.value.exit_code == 130
    assert "STOPPED" in next(tmp_path.rglob("result.json")).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_signal_ends_the_run(number: int, code: int, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        train(job("ps-sync", 2, **LONG_STEPS), tmp_path, callbacks=(Signaller(number),))
    assert caught.value.exit_code == code
    assert "STOPPED" in next(tmp_path.rglob("result.json")).read_text()
