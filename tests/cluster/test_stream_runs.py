"""Streams on real processes: a killed worker, and Ray Data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from local_run import train as train_in_memory
from numpy.typing import NDArray
from small_runs import distance, job, train, weights
from tasks_for_tests import Blobs

from distplat.strategies.catalog import make_job

DETACHED = (
    ("AutoscalingCoordinator", "AutoscalingCoordinator"),
    ("datasets_stats_actor", "_dataset_stats_actor"),
)
pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


def weights_of_indexed_data(spec: dict[str, Any]) -> NDArray[np.float32]:
    """Train in memory on the same samples, read by index; return the model."""
    fields = {**spec, "task_args": {}, "data": {"shuffle": False}}
    state = train_in_memory(make_job(fields), Blobs).parameters()
    return np.concatenate([state[name].numpy().ravel() for name in sorted(state)])


@pytest.mark.slow
def test_killed_worker_loses_no_sample(tmp_path: Path) -> None:
    """The replacement's loaders continue at the position in the checkpoint."""
    spec = job(
        "ring",
        2,
        task="tasks_for_tests:Streamed",
        task_args={"fault": "kill", "marker": str(tmp_path / "killed"), "at": 9},
        data={"num_workers": 1},
        checkpoint={"every_steps": 4},
    )
    result = train(spec, tmp_path)
    assert (tmp_path / "killed").exists()
    assert result.failures
    assert sorted(step.step for step in result.history) == [*range(1, 16)]
    assert weights(result).tobytes() == weights_of_indexed_data(spec).tobytes()


@pytest.mark.slow
def test_ray_dataset_matches_indexed_dataset(tmp_path: Path) -> None:
    spec = job("ring", 2, task="tasks_for_tests:OfRayData", steps=4, epochs=None)
    result = train(spec, tmp_path)
    for name, namespace in DETACHED:  # detached actors of Ray Data
        ray.kill(ray.get_actor(name, namespace))
    assert distance(weights(result), weights_of_indexed_data(spec)) < 1e-6
