"""A spare worker replaces a lost worker, and clients find the rank."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from local_run import train as train_in_memory
from safetensors.torch import load_file
from small_runs import BesideTraining, job, train
from tasks_for_tests import Blobs

import distplat
from distplat.actors.overview import named_actors
from distplat.actors.weights import WeightsSnapshot
from distplat.platform.progress import Recovery
from distplat.strategies.catalog import make_job

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


class RankKiller(BesideTraining):
    """Kills rank 0 once a spare is ready; records the actors after the recovery. A `Callback`."""

    def __init__(self, done: Path) -> None:
        super().__init__()
        self.done = done
        self.recovered = threading.Event()
        self.names: list[str] = []
        self.snapshot: WeightsSnapshot | None = None

    def on_recovery(self, recovery: Recovery) -> None:
        self.recovered.set()

    def run(self) -> None:
        try:
            assert self.training.wait(60)
            deadline = time.monotonic() + 60
            while "small/spare-0" not in self._actor_names():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            spare, worker = (
                ray.get_actor(name, namespace=self.run_name)
                for name in ("small/spare-0", "small/worker-0")
            )
            ray.get(spare.ping.remote(), timeout=60)
            ray.kill(worker)
            assert self.recovered.wait(60)
            self.names = self._actor_names()
            self.snapshot = distplat.weights("small").latest(timeout_s=30)
        finally:
            self.done.touch()

    def _actor_names(self) -> list[str]:
        return named_actors().get(self.run_name, [])


def test_spare_replaces_lost_worker(tmp_path: Path) -> None:
    done = tmp_path / "goes_on"
    fields: dict[str, Any] = {"epochs": None, "steps": 300, "evaluation": {"every_epochs": 0}}
    paced = {"task": "tasks_for_tests:Paced", "task_args": {"until": str(done)}}
    killer = RankKiller(done)
    spec = job("ring", 2, **fields, **paced, failure={"spare_workers": True})
    result = train(spec, tmp_path, callbacks=(killer,))
    killer.join(60)
    assert "small/spare-0" in killer.names
    assert not [name for name in killer.names if name.startswith("small/worker-0")]
    assert killer.snapshot is not None, "clients find rank 0, whose actor is named spare"
    assert result.checkpoint is not None
    found, in_memory = (
        load_file(result.checkpoint),
        train_in_memory(make_job(job("ring", 2, **fields)), Blobs),
    )
    (expected, *_) = in_memory.trained
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
