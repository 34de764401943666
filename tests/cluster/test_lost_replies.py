"""
Ray loses a quarter of the calls, or of their replies: every gradient counts once.

Uses Ray's failure injection, set in the environment of the cluster's processes and of the driver:
workers, servers and controller lose messages to each other, and the driver loses some to the
controller. Ray needs a second or more to report a lost message, so only a few are lost here;
`tests/unit/test_local_servers.py` and `test_controller_client.py` lose every type of call.
"""

import json
import re
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
LOST = rf"Inject RPC (\w+) failure for {PUSH_TASK}"
STEPS = 10
TWO_EPOCHS = {"epochs": 2}


@pytest.fixture
def losing_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start a cluster and a driver whose processes lose some messages."""
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
    for clip_norm in (None, 1.0):  # one round of calls per step, and two
        spec = job({"name": "ps-sync", "num_servers": 2}, 2, clip_norm=clip_norm, **TWO_EPOCHS)
        found = weights(train(spec, tmp_path))
        assert found.tobytes() == unfailed_weights(spec, tmp_path)
    strategy = {"name": "ps-async", "num_servers": 2, "staleness": 2}
    result = train(job(strategy, 2, **TWO_EPOCHS), tmp_path)
    for log in read_logs(str(result.path / FILE_NAME))[0]:
        assert log_flaws(log, 2, STEPS) == []
    assert run(["replay", str(result.path), "--working-dir", str(HERE)]) == 0
    assert lost_messages() == {"request", "response"}


def lost_messages() -> set[str]:
    """Return the types of messages that Ray has lost, from the logs of its workers."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    texts = [path.read_text(errors="replace") for path in logs.glob("python-core-worker-*.log")]
    return {kind for text in texts for kind in re.findall(LOST, text)}


def unfailed_weights(spec: dict[str, Any], tmp_path: Path) -> bytes:
    """
    Train in memory; return the bytes of the model.

    Ranks in memory sum in rank order, as over Ray: models are bit-identical.
    """
    from local_run import train as train_in_memory
    from tasks_for_tests import Blobs

    from distplat.strategies.catalog import make_job

    parameters = train_in_memory(make_job(spec), Blobs).parameters()
    return b"".join(parameters[name].numpy().tobytes() for name in sorted(parameters))
