"""A worker killed by Ray's memory monitor is replaced, and the failure names the cause."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from small_runs import job, train

pytestmark = pytest.mark.cluster

HEADROOM = 4 * 2**30
"""Memory that processes may allocate before the monitor kills one."""


@pytest.fixture
def monitored_ray() -> Iterator[None]:
    """Start a cluster whose monitor acts once `HEADROOM` more bytes are allocated."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + HEADROOM) / memory.total
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
def test_worker_killed_by_memory_monitor_is_replaced(monitored_ray: None, tmp_path: Path) -> None:
    args = {"marker": str(tmp_path / "done")}
    spec = job("ring", 2, task="tasks_for_tests:Hungry", task_args=args)
    result = train(spec, tmp_path)
    causes = [failure.cause for failure in result.failures]
    assert any("was lost" in cause and "Ray's memory monitor" in cause for cause in causes), causes
    assert result.history[-1].step == result.history[-1].of
