"""Ray's memory monitor kills a worker: a loss like another, whose cause is named."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from small_runs import job, train

pytestmark = pytest.mark.cluster

ROOM = 4 * 2**30
"""What the processes of a run, and others of the machine, may take before the monitor kills."""


@pytest.fixture
def watched_ray() -> Iterator[None]:
    """A cluster whose monitor finds the machine full as soon as some gigabytes more are taken."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ROOM) / memory.total
    node: dict[str, Any] = {"num_cpus": 8, "object_store_memory": 100 * 2**20}
    node["env_vars"] = {
        "RAY_memory_usage_threshold": f"{threshold:.4f}",
        "RAY_memory_monitor_refresh_ms": "50",
    }
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    ray.init(address=cluster.address, logging_level="warning")
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_worker_that_is_killed_for_memory_is_replaced(watched_ray: None, tmp_path: Path) -> None:
    args = {"marker": str(tmp_path / "done")}
    spec = job("ring", 2, task="tasks_for_tests:Hungry", task_args=args)
    result = train(spec, tmp_path)
    causes = [failure.cause for failure in result.failures]
    assert any("was lost" in cause and "Ray's memory monitor" in cause for cause in causes), causes
    assert result.history[-1].step == result.history[-1].of
