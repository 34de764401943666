"""
Ray loses a quarter of the calls, or of their answers: every gradient counts once.

Ray's own failure injection, in the environment of a cluster's processes and of the driver: workers,
servers and controller lose messages to each other, and the driver some to the controller. A lost
message costs Ray a second or more until it says so, hence few of them;
`tests/unit/test_local_servers.py` and `test_controller_client.py` lose each kind of call.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from small_runs import HERE, job, train, weights

from distplat.cli.main import run
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs

pytestmark = pytest.mark.cluster

PUSH_TASK = "CoreWorkerService.grpc_client.PushTask"
STEPS = 10
SHORT = {"epochs": 2}


@pytest.fixture
def losing_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster in which each process loses some messages, and a driver that does."""
    lost = {"req_failure_prob": 12, "resp_failure_prob": 13, "in_flight_failure_prob": 0}
    chaos = {PUSH_TASK: {"num_failures": 3, **lost}}
    node: dict[str, Any] = {"num_cpus": 8, "object_store_memory": 100 * 2**20}
    node["env_vars"] = {"RAY_testing_rpc_failure": json.dumps(chaos)}
    monkeypatch.setenv("RAY_testing_rpc_failure", json.dumps(chaos))
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    ray.init(address=cluster.address, logging_level="warning")
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(240)  # each lost message takes Ray seconds to notice
def test_every_gradient_counts_once(losing_ray: None, tmp_path: Path) -> None:
    for clip_norm in (None, 1.0):  # one round of calls, and two
        spec = job({"name": "ps-sync", "num_servers": 2}, 2, clip_norm=clip_norm, **SHORT)
        found = weights(train(spec, tmp_path))
        assert found.tobytes() == undisturbed(spec, tmp_path)
    strategy = {"name": "ps-async", "num_servers": 2, "staleness": 2}
    result = train(job(strategy, 2, **SHORT), tmp_path)
    for log in read_logs(str(result.path / FILE_NAME))[0]:
        assert log_flaws(log, 2, STEPS) == []
    assert run(["replay", str(result.path), "--working-dir", str(HERE)]) == 0


def undisturbed(spec: dict[str, Any], tmp_path: Path) -> bytes:
    """
    Give the bits of the same run on servers in memory.

    A cluster beside this one would take minutes. In memory, ranks are threads: they sum in rank
    order as over Ray, so the bits are the same.
    """
    from local_run import train as train_in_memory
    from tasks_for_tests import Blobs

    from distplat.strategies.catalog import make_job

    parameters = train_in_memory(make_job(spec), Blobs).parameters()
    return b"".join(parameters[name].numpy().tobytes() for name in sorted(parameters))
