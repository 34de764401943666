"""Runs that stop and go on, and runs that lose state and go back: the bits are those of one run."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from small_runs import job, train, weights

from distplat import Result
from distplat.platform.checkpoints import Catalogue
from distplat.platform.progress import Recovery, Setback

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(180)]

STEPS, EVERY = 20, 5
RING: dict[str, Any] = {"name": "ring", "timeout_s": 4}
SHARDED: dict[str, Any] = {**RING, "shard_optimizer": True}
SERVERS: dict[str, Any] = {"name": "ps-sync", "num_servers": 2}


class Killer(threading.Thread):
    """Kills the process of a role once a checkpoint should be there. An `Observer`."""

    def __init__(self, role: str, at: int) -> None:
        super().__init__(daemon=True)
        self.role, self.at = role, at
        self.reached = threading.Event()

    def started(self, job: object, run: str, path: Path) -> None:
        self.start()

    def stepped(self, summary: Any) -> None:
        if summary.step >= self.at:
            self.reached.set()

    def disturbed(self, news: Setback | Recovery) -> None:
        pass

    def run(self) -> None:
        if not self.reached.wait(60):
            return
        for process in psutil.process_iter():
            title = " ".join(process.cmdline()) if process.is_running() else ""
            if title.startswith(f"ray::{self.role}"):
                os.kill(process.pid, signal.SIGKILL)
                return


def spec(tmp_path: Path, strategy: object, deeds: list[str], **more: Any) -> dict[str, Any]:
    folder = tmp_path / f"marks-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    fields: dict[str, Any] = {
        "task": "tasks_for_tests:Elastic",
        "task_args": {"folder": str(folder), "deeds": deeds},
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
    """The run without a loss; made once, for its checkpoints too."""
    key = repr(strategy)
    if key not in _unfailed:
        result = train(spec(tmp_path, strategy, []), tmp_path)
        assert [saved.step for saved in result.checkpoints][-1] == STEPS
        _unfailed[key] = weights(result), result
    return _unfailed[key]


def same(result: Result, tmp_path: Path, strategy: object) -> None:
    """The same weights and buffers, bit for bit; every step and evaluation is told once."""
    bits, other = unfailed(tmp_path, strategy)
    assert np.array_equal(weights(result), bits)
    assert [s.step for s in result.history] == list(range(STEPS))
    assert len(result.evaluations) == len(other.evaluations)
    assert Catalogue(result.path / "checkpoints").steps() == [STEPS - EVERY, STEPS]


@pytest.mark.parametrize("strategy", [RING, SHARDED, SERVERS], ids=["ring", "sharded", "ps-sync"])
def test_a_run_goes_on_where_another_stopped(strategy: object, tmp_path: Path) -> None:
    bits, whole = unfailed(tmp_path, strategy)
    checkpoint = whole.path / "checkpoints" / f"step-{STEPS - EVERY:06d}"
    resumed = train(spec(tmp_path, strategy, []), tmp_path, resume=checkpoint)
    assert np.array_equal(weights(resumed), bits)
    assert [s.step for s in resumed.history] == list(range(STEPS - EVERY, STEPS))
    assert resumed.history[-1].loss == whole.history[-1].loss
    assert json.loads((resumed.path / "result.json").read_text())["resumed_from"] == str(checkpoint)


@pytest.mark.parametrize(
    ("deeds", "strategy"),
    [
        (["kill 1 at 12"], SERVERS),
        (["kill 0 at 12"], SHARDED),
        (["kill all at 12"], RING),
    ],
    ids=["a worker beside servers", "a part of the optimizer", "all at once"],
)
def test_lost_state_comes_from_the_checkpoint(
    deeds: list[str], strategy: object, tmp_path: Path
) -> None:
    result = train(spec(tmp_path, strategy, deeds), tmp_path)
    same(result, tmp_path, strategy)
    assert [(s.step, len(s.replaced)) for s in result.setbacks] == [(10, 2)]


@pytest.mark.parametrize("role", ["ServerNode", "ServerManager"])
def test_a_lost_server_costs_the_steps_since_the_checkpoint(role: str, tmp_path: Path) -> None:
    killer = Killer(role, 11)
    result = train(spec(tmp_path, SERVERS, []), tmp_path, observers=(killer,))
    same(result, tmp_path, SERVERS)
    assert len(result.setbacks) == 1
    assert result.setbacks[0].step >= 10


def test_a_resumed_run_that_loses_all_goes_back_to_what_it_began_from(tmp_path: Path) -> None:
    bits, whole = unfailed(tmp_path, RING)
    checkpoint = whole.path / "checkpoints" / f"step-{STEPS - EVERY:06d}"
    never = {"checkpoint": {"every_steps": 1000}}
    again = spec(tmp_path, RING, ["kill all at 17"], **never)
    result = train(again, tmp_path, resume=checkpoint)
    assert np.array_equal(weights(result), bits)
    assert [s.step for s in result.setbacks] == [STEPS - EVERY]


def test_an_asynchronous_run_goes_back_with_all_its_shards(tmp_path: Path) -> None:
    strategy = {"name": "ps-async", "num_servers": 2, "staleness": 2}
    result = train(spec(tmp_path, strategy, ["kill 1 at 12"], clip_norm=None), tmp_path)
    assert len(result.setbacks) == 1
    assert result.setbacks[0].step in (0, 5, 10)
    assert [s.step for s in result.history] == list(range(STEPS))
    assert Catalogue(result.path / "checkpoints").steps()[-1] == STEPS
    complete = result.setbacks[0].step == 0
    assert (result.path / "apply_log.safetensors").exists() == complete
