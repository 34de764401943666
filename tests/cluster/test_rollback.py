"""Resumed runs, and runs that roll back to a checkpoint, match a run without a failure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_runs import job, train, weights

from distplat import Result
from distplat.platform.checkpoints import Catalogue

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(180)]

STEPS, EVERY = 20, 5
SHARDED: dict[str, Any] = {"name": "ring", "timeout_s": 4, "shard_optimizer": True}
SERVERS: dict[str, Any] = {"name": "ps-sync", "num_servers": 2}


def spec(
    tmp_path: Path, strategy: object, faults: list[str], *, saved: bool = False, **more: Any
) -> dict[str, Any]:
    """Return the fields of a job; `saved`: faults wait until a checkpoint is on the disk."""
    folder = tmp_path / f"marks-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    fields: dict[str, Any] = {
        "task": "tasks_for_tests:Elastic",
        "task_args": {
            "folder": str(folder),
            "faults": faults,
            "pause": 0.04,
            "saved": str(tmp_path) if saved else "",
        },
        "optimizer": {"name": "AdamW", "lr": 0.02},
        "epochs": None,
        "steps": STEPS,
        "lr_schedule": {"name": "cosine"},
        "data": {"drop_last": True},
        "clip_norm": 1.0,
        "checkpoint": {"every_steps": EVERY},
        "failure": {"step_timeout_s": 30, "heartbeat_timeout_s": 20},
    }
    return job(strategy, 2, **{**fields, **more})


_unfailed: dict[str, tuple[NDArray[np.float32], Result]] = {}


def unfailed(tmp_path: Path, strategy: object) -> tuple[NDArray[np.float32], Result]:
    """Return weights and result of the run without a loss, which is cached."""
    key = repr(strategy)
    if key not in _unfailed:
        result = train(spec(tmp_path, strategy, []), tmp_path)
        assert [saved.step for saved in result.checkpoints][-1] == STEPS
        _unfailed[key] = weights(result), result
    return _unfailed[key]


def assert_matches_unfailed(result: Result, tmp_path: Path, strategy: object) -> None:
    """Compare weights and buffers; each step and evaluation is reported once."""
    expected, unfailed_result = unfailed(tmp_path, strategy)
    assert np.array_equal(weights(result), expected)
    assert [s.step for s in result.history] == list(range(1, STEPS + 1))
    assert len(result.evaluations) == len(unfailed_result.evaluations)
    assert Catalogue(result.path / "checkpoints").steps() == [STEPS - EVERY, STEPS]


@pytest.mark.slow
def test_resumed_run_continues_from_checkpoint(tmp_path: Path) -> None:
    expected, unfailed_result = unfailed(tmp_path, SERVERS)
    checkpoint = unfailed_result.path / "checkpoints" / f"step-{STEPS - EVERY:06d}"
    resumed = train(spec(tmp_path, SERVERS, []), tmp_path, resume=checkpoint)
    assert np.array_equal(weights(resumed), expected)
    assert [s.step for s in resumed.history] == list(range(STEPS - EVERY + 1, STEPS + 1))
    assert resumed.history[-1].loss == unfailed_result.history[-1].loss
    assert json.loads((resumed.path / "result.json").read_text())["resumed_from"] == str(checkpoint)


@pytest.mark.slow
def test_lost_server_is_restored_from_checkpoint(tmp_path: Path) -> None:
    result = train(spec(tmp_path, SERVERS, ["ServerNode 0 at 13"], saved=True), tmp_path)
    assert_matches_unfailed(result, tmp_path, SERVERS)
    (failure,) = result.failures
    assert len(failure.replaced) == 2
    assert failure.step >= EVERY, "a checkpoint in flight is lost with its server"


@pytest.mark.slow
def test_lost_workers_are_restored_from_checkpoint(tmp_path: Path) -> None:
    """First a worker with a part of the sharded state, then all workers."""
    result = train(
        spec(tmp_path, SHARDED, ["kill 0 at 13", "kill all at 18"], saved=True), tmp_path
    )
    assert_matches_unfailed(result, tmp_path, SHARDED)
    first, second = result.failures
    assert len(first.replaced) == len(second.replaced) == 2
    assert EVERY <= first.step <= second.step


@pytest.mark.slow
def test_resumed_run_rolls_back_to_its_first_checkpoint(tmp_path: Path) -> None:
    expected, unfailed_result = unfailed(tmp_path, SHARDED)
    checkpoint = unfailed_result.path / "checkpoints" / f"step-{STEPS - EVERY:06d}"
    never: dict[str, Any] = {"checkpoint": {"every_steps": 1000}}
    again = spec(tmp_path, SHARDED, ["kill 0 at 17"], **never)
    result = train(again, tmp_path, resume=checkpoint)
    assert np.array_equal(weights(result), expected)
    assert [s.step for s in result.failures] == [STEPS - EVERY]
    assert [s.step for s in result.history] == list(range(STEPS - EVERY + 1, STEPS + 1))
    assert result.history[-1].loss == unfailed_result.history[-1].loss


@pytest.mark.slow
def test_asynchronous_run_rolls_back_all_shards(tmp_path: Path) -> None:
    strategy = {"name": "ps-async", "num_servers": 2, "staleness": 2}
    result = train(spec(tmp_path, strategy, ["ServerNode 0 at 13"], clip_norm=None), tmp_path)
    (failure,) = result.failures
    assert "server" in failure.cause
    assert failure.step in (0, 5, 10, 15), (
        "the newest checkpoint depends on the other rank's progress"
    )
    assert [s.step for s in result.history] == list(range(1, STEPS + 1))
    assert Catalogue(result.path / "checkpoints").steps()[-1] == STEPS
    complete = failure.step == 0
    assert (result.path / "apply_log.safetensors").exists() == complete
