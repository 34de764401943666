"""When a part fails: a typed error that names it, within its deadline, never a hang."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from killed_runs import LONG, Killer, misbehaving
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
def test_user_exception_on_one_rank(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(UserCodeError) as caught:
        train(misbehaving(strategy, "raise", tmp_path), tmp_path)
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
        train(misbehaving("ring", "exit", tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_killed_worker(strategy: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ActorLost, match=r"worker-\d was lost after step \d+"):
        train(misbehaving(strategy, "kill", tmp_path), tmp_path)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_killed_server(tmp_path: Path) -> None:
    killer = Killer("ServerNode", signal.SIGKILL)
    spec = job({"name": "ps-sync", "num_servers": 2}, 2, **LONG)
    with pytest.raises(ActorLost, match="server"):
        train(spec, tmp_path, callbacks=(killer,))
    assert time.monotonic() - killer.done_at < 15


@pytest.mark.slow
def test_killed_controller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The census finds what it leaves: its actors and the driver's are all to be gone."""

    def two_checkpoints() -> bool:  # of which the first one is whole
        return len(list(tmp_path.rglob("checkpoints/*/model.safetensors"))) > 1

    killer = Killer("ControllerActor", signal.SIGKILL, two_checkpoints)
    spec = job("ps-sync", 2, checkpoint={"every_steps": 5}, **LONG)
    with pytest.raises(ActorLost, match=r"controller was lost after step \d+.*--resume") as caught:
        train(spec, tmp_path, callbacks=(killer,))
    assert caught.value.exit_code == 4
    logs = [one.args for one in caplog.records if str(one.msg).startswith("Ray's own logs are in")]
    assert [Path(*map(str, folder), "raylet.out").is_file() for folder in logs if folder] == [True]
    (folder,) = tmp_path.rglob("checkpoints")
    saved = Catalogue(folder).newest(lambda *said: None)
    assert saved is not None and saved.step > 0
    resumed = train({**spec, "steps": saved.step + 3}, tmp_path, resume=folder.parent)
    assert [summary.step for summary in resumed.history][-1] == saved.step + 3


def test_killed_driver(tmp_path: Path) -> None:
    """All actors end with it, the one too that the controller has made; the census looks."""
    spec = misbehaving("ring", "kill", tmp_path, failure={"max_failures": 1})
    (tmp_path / "job.yaml").write_text(json.dumps({**spec, "storage_path": str(tmp_path)}))
    address = ray.get_runtime_context().gcs_address
    submit = ["-m", "distplat.cli.main", "submit", str(tmp_path / "job.yaml"), "--working-dir"]
    driver = subprocess.Popen([sys.executable, *submit, str(HERE), "--address", address])
    until = time.monotonic() + 90
    while not any("recovery" in file.read_text() for file in tmp_path.rglob("metrics.jsonl")):
        assert driver.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    driver.kill()
    assert driver.wait(10) == -signal.SIGKILL
    (folder,) = (file.parent for file in tmp_path.rglob("metrics.jsonl"))
    ray_compat.delete_all(rendezvous_key(folder.name))  # the driver would have done that


@pytest.mark.parametrize("strategy", [{"name": "ring", "timeout_s": 2}, slow("ps-sync")])
def test_frozen_worker_is_named(strategy: object, tmp_path: Path) -> None:
    failure = {"step_timeout_s": 3, "heartbeat_timeout_s": 60}
    with pytest.raises((CollectiveError, DeadlineExceeded)) as caught:
        train(misbehaving(strategy, "stop", tmp_path, failure=failure), tmp_path)
    error = caught.value
    assert isinstance(error, CollectiveError | DeadlineExceeded)
    assert error.missing in ((0,), (1,), ("worker-0",), ("worker-1",))


@pytest.mark.slow
def test_frozen_worker_answers_no_poll(tmp_path: Path) -> None:
    failure = {"step_timeout_s": 60, "heartbeat_timeout_s": 2}
    with pytest.raises(ActorLost, match=r"worker-\d was lost.*not answered for \d s"):
        train(misbehaving("ps-sync", "stop", tmp_path, failure=failure), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{"name": "ring", "timeout_s": 4}, "ps-sync"])
def test_a_slow_start_is_no_failure(strategy: object, tmp_path: Path) -> None:
    args = {"marker": str(tmp_path / "done"), "seconds": 6}
    spec = job(strategy, 2, task="tasks_for_tests:SlowStart", task_args=args)
    result = train({**spec, "failure": {"step_timeout_s": 4}}, tmp_path)
    assert len(result.history) == 15


class Hog:
    """Holds the cluster's CPUs until it is killed."""

    def ping(self) -> None:
        pass


@pytest.mark.slow
def test_a_busy_cluster_is_waited_for(tmp_path: Path) -> None:
    hog = ray.remote(Hog).options(num_cpus=8).remote()
    ray.get(hog.ping.remote(), timeout=30)
    release = threading.Timer(5, ray.kill, [hog])
    release.start()
    failure = {"heartbeat_timeout_s": 2}
    result = train(job("ps-sync", 2, failure=failure), tmp_path)
    release.join(10)
    assert len(result.history) == 15


@pytest.mark.slow
def test_nobody_comes(tmp_path: Path) -> None:
    hog = ray.remote(Hog).options(num_cpus=8).remote()
    ray.get(hog.ping.remote(), timeout=30)
    with pytest.raises(DeadlineExceeded, match=r"missing: worker-0, worker-1; .*start_timeout_s"):
        train(job("ring", 2, failure={"start_timeout_s": 3}), tmp_path)
    ray.kill(hog)


@pytest.mark.slow
def test_endless_user_code_is_named(tmp_path: Path) -> None:
    spec = misbehaving("ring", "hang", tmp_path, failure={"step_timeout_s": 2})
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


class Impatient(Killer):
    """Freezes the controller, so that an orderly end takes long; then Ctrl-C, and once more."""

    def __init__(self) -> None:
        super().__init__("ControllerActor", signal.SIGSTOP)

    def run(self) -> None:
        super().run()
        for _ in range(2):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)
        self.done_at = time.monotonic()


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    """On a Ray that stays, as in a notebook; the census looks for actors."""
    impatient = Impatient()
    with pytest.raises(Interrupted) as caught:
        train(job("ring", 2, **LONG), tmp_path, callbacks=(impatient,))
    assert time.monotonic() - impatient.done_at < 5
    assert caught.value.exit_code == 130
    assert "STOPPED" in next(tmp_path.rglob("result.json")).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_signal_ends_the_run(number: int, code: int, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        train(job("ps-sync", 2, **LONG), tmp_path, callbacks=(Signaller(number),))
    assert caught.value.exit_code == code
    assert "STOPPED" in next(tmp_path.rglob("result.json")).read_text()
