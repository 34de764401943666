"""A spare worker takes a lost one's place: the same bits, and the world outside sees the rank."""

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


class Replacing(BesideTraining):
    """Ends rank 0 once a spare is up; notes who is there when all go on. A `Callback`."""

    def __init__(self, goes_on: Path) -> None:
        super().__init__()
        self.goes_on = goes_on
        self.recovered = threading.Event()
        self.names: list[str] = []
        self.snapshot: WeightsSnapshot | None = None

    def on_recovery(self, recovery: Recovery) -> None:
        self.recovered.set()

    def run(self) -> None:
        try:
            assert self.training.wait(60)
            until = time.monotonic() + 60
            while "small/spare-0" not in self._there():
                assert time.monotonic() < until
                time.sleep(0.05)
            spare, worker = (
                ray.get_actor(name, namespace=self.run_name)
                for name in ("small/spare-0", "small/worker-0")
            )
            ray.get(spare.ping.remote(), timeout=60)
            ray.kill(worker)
            assert self.recovered.wait(60)
            self.names = self._there()
            self.snapshot = distplat.weights("small").latest(timeout_s=30)
        finally:
            self.goes_on.touch()

    def _there(self) -> list[str]:
        return named_actors().get(self.run_name, [])


def test_a_spare_takes_the_place_of_a_lost_worker(tmp_path: Path) -> None:
    goes_on = tmp_path / "goes_on"
    fields: dict[str, Any] = {"epochs": None, "steps": 300, "evaluation": {"every_epochs": 0}}
    paced = {"task": "tasks_for_tests:Paced", "task_args": {"until": str(goes_on)}}
    replacing = Replacing(goes_on)
    spec = job("ring", 2, **fields, **paced, failure={"spare_workers": True})
    result = train(spec, tmp_path, callbacks=(replacing,))
    replacing.join(60)
    assert "small/spare-0" in replacing.names
    assert not [name for name in replacing.names if name.startswith("small/worker-0")]
    assert replacing.snapshot is not None, "rank 0 is found, though Ray calls it a spare"
    assert result.checkpoint is not None
    found, whole = (
        load_file(result.checkpoint),
        train_in_memory(make_job(job("ring", 2, **fields)), Blobs),
    )
    (expected, *_) = whole.trained
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
