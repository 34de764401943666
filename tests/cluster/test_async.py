"""`ps-async` on Ray: every gradient counts once, runs replay, and lost processes are named."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed_runs import Killer, misbehaving_job
from leads import largest_lead
from safetensors.numpy import load_file, save_file
from small_runs import HERE, job, train

from distplat import Result
from distplat.cli.main import run as command
from distplat.platform.apply_log import FILE_NAME, ApplyLog, log_flaws, read_logs
from distplat.platform.errors import ActorLost, DeadlineExceeded

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

STEPS = 15


def logs_of(result: Result) -> list[ApplyLog]:
    return read_logs(str(result.path / FILE_NAME))[0]


def replay(path: Path) -> int:
    return command(["replay", str(path), "--working-dir", str(HERE)])


@pytest.mark.slow  # in memory: test_ps_async.py
@pytest.mark.parametrize(
    ("strategy", "workers"),
    [
        ({"name": "ps-async", "num_servers": 2}, 3),
        (
            {"name": "ps-async", "staleness": 1, "staleness_lr": True, "delay_compensation": 0.5},
            2,
        ),
    ],
)
def test_replay_from_log_is_bit_identical(
    strategy: dict[str, Any], workers: int, tmp_path: Path
) -> None:
    """Dropout and batch norm are per rank. Evaluations pull parameters between steps."""
    more = {"clip_norm": 1.0, "data": {"drop_last": True}}  # batch norm needs more than one sample
    result = train(job(strategy, workers, task="tasks_for_tests:Drop", **more), tmp_path)
    assert [s.step for s in result.history] == list(range(1, 13))
    assert [e.step for e in result.evaluations] == [4, 8, 12]
    logs = logs_of(result)
    assert len(logs) == strategy.get("num_servers", 1)
    for log in logs:
        assert log_flaws(log, workers, 12) == []
        assert largest_lead(log, workers) <= strategy.get("staleness", STEPS)
    assert replay(result.path) == 0


def test_replay_reports_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = train(job("ps-async", 0), tmp_path).path
    assert replay(path) == 0
    assert "the same bits" in capsys.readouterr().out
    state = load_file(path / "model.safetensors")
    state["2.bias"] = np.nextafter(state["2.bias"], np.float32(1))
    save_file(state, path / "model.safetensors")
    assert command(["replay", str(path), "--working-dir", str(HERE), "-o", "json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["same_bits"], facts["differing"]) == (False, "2.bias")
    assert 0 < facts["difference"] < 1e-6
    assert facts["staleness"] == [{"0": STEPS}]
    (path / FILE_NAME).unlink()
    assert replay(path) == 5
    assert FILE_NAME in capsys.readouterr().err


def test_replay_refuses_synchronous_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = train(job("ps-sync", 0), tmp_path).path
    assert not (path / FILE_NAME).exists()
    assert replay(path) == 2
    assert "run `ps-sync` again" in capsys.readouterr().err


def test_replay_refuses_log_of_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, short = (train(job("ps-async", 0, epochs=n), tmp_path).path for n in (2, 1))
    shutil.copy(short / FILE_NAME, long / FILE_NAME)
    assert replay(long) == 5
    assert "5 tasks are missing, the first is 5" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_worker_is_named(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ActorLost, match=r"worker-\d was lost"):
        train(misbehaving_job("ps-async", "kill", tmp_path), tmp_path)
    assert time.monotonic() - start < 60


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["unbounded", 2])
def test_frozen_worker_is_named(bound: object, tmp_path: Path) -> None:
    """With a bound other ranks wait at the servers; without, only the controller detects it."""
    failure = {"step_timeout_s": 3, "heartbeat_timeout_s": 4}
    strategy = {"name": "ps-async", "staleness": bound}
    with pytest.raises((ActorLost, DeadlineExceeded)) as caught:
        train(misbehaving_job(strategy, "stop", tmp_path, failure=failure), tmp_path)
    assert "worker-" in str(caught.value)


@pytest.mark.slow
def test_worker_frozen_at_the_end_is_named(tmp_path: Path) -> None:
    """Other ranks have finished their steps and wait for its last push."""
    failure = {"step_timeout_s": 3, "heartbeat_timeout_s": 60, "max_failures": 0}
    spec = misbehaving_job("ps-async", "stop", tmp_path, failure=failure)
    with pytest.raises(DeadlineExceeded, match=r"missing: worker-\d"):
        train({**spec, "steps": 8}, tmp_path)


@pytest.mark.slow
def test_killed_server_is_named(tmp_path: Path) -> None:
    killer = Killer("ServerNode", signal.SIGKILL)
    spec = misbehaving_job({"name": "ps-async", "num_servers": 2}, "none", tmp_path)
    spec["task_args"]["at"] = 10**9
    with pytest.raises(ActorLost, match="server"):
        train(spec, tmp_path, callbacks=(killer,))
    assert time.monotonic() - killer.killed_at < 15


@pytest.mark.slow
def test_run_waits_for_slow_worker_at_the_end(tmp_path: Path) -> None:
    """The wait is twice `step_timeout_s`, but the worker makes progress."""
    args = {"seconds": 0.35}
    more = {"task": "tasks_for_tests:SlowFirst", "task_args": args, "steps": 12, "epochs": None}
    spec = job("ps-async", 2, failure={"step_timeout_s": 2}, **more)
    result = train(spec, tmp_path)
    assert len(result.history) == 12
    assert largest_lead(logs_of(result)[0], 2) > 6
