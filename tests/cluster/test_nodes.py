"""Two Ray nodes on one host: data takes other paths, and results do not change."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from local_run import train as train_in_memory
from ray.cluster_utils import Cluster
from server_losses import PrimaryKiller, long_job, unfailed_weights
from small_runs import HERE, distance, job, train, weights
from table_runs import read_tables, words_job
from tasks_for_tests import Big, Huge

from distplat import Callback
from distplat.cli.main import run
from distplat.platform.progress import StepSummary
from distplat.strategies.catalog import make_job

pytestmark = pytest.mark.cluster

SLOTS = {"CPU": 0.5, "slot": 1}


@pytest.fixture(scope="module", autouse=True)
def two_nodes() -> Iterator[Cluster]:
    """Start two nodes with two slots each: four actors with a slot are two on each node."""
    node: dict[str, Any] = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**node, "resources": {"slot": 2, "left": 8}, "include_dashboard": False},
    )
    cluster.add_node(**node, resources={"slot": 2, "right": 8})
    ray.init(address=cluster.address, logging_level="warning")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train in one process; return the model."""
    return weights(train(big_job("ring", {"num_workers": 0}), tmp_path_factory.mktemp("alone")))


def big_job(strategy: object, scaling: dict[str, Any]) -> dict[str, Any]:
    fields = {"task": "tasks_for_tests:Big", "steps": 5, "epochs": None, "clip_norm": 1.0}
    return job(strategy, 0, **{**fields, "scaling": scaling})


def scaling(workers: int, **resources: float) -> dict[str, Any]:
    return {"num_workers": workers, "resources_per_worker": {"CPU": 0.5, **resources}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "scale"),
    [
        pytest.param(
            {"name": "ps-sync", "resources_per_server": {"slot": 1}},
            scaling(3, slot=1),
            id="one-worker-near-two-far",
        ),
        pytest.param("ring", scaling(4, slot=1), id="ring-across-nodes"),
    ],
)
def test_workers_on_two_nodes_match_one_process(
    strategy: object, scale: dict[str, Any], one_process: Any, tmp_path: Path
) -> None:
    result = train(big_job(strategy, scale), tmp_path)
    assert distance(weights(result), one_process) < 1e-5


@pytest.mark.slow
def test_asynchronous_run_on_two_nodes_replays(tmp_path: Path) -> None:
    """The replay is bit-identical only if workers pulled consistent parameters."""
    strategy = {"name": "ps-async", "num_servers": 2, "resources_per_server": {"right": 1}}
    result = train(big_job(strategy, scaling(2, left=1)), tmp_path)
    assert run(["replay", str(result.path), "--working-dir", str(HERE)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("servers", "scale"),
    [
        pytest.param({"right": 1}, scaling(2, left=1), id="all-servers-elsewhere"),
        pytest.param({"slot": 1}, scaling(1, slot=1), id="one-server-near-two-far"),
    ],
)
def test_model_does_not_depend_on_server_placement(
    servers: dict[str, float], scale: dict[str, Any], tmp_path: Path
) -> None:
    strategy = {"name": "ps-sync", "num_servers": 3, "resources_per_server": servers}
    spec = big_job(strategy, scale)
    result = train(spec, tmp_path)
    parameters = train_in_memory(make_job(spec), Big).parameters()
    expected = np.concatenate([parameters[name].numpy().ravel() for name in sorted(parameters)])
    assert weights(result).tobytes() == expected.tobytes()


@pytest.mark.slow
def test_bf16_wire_between_nodes(one_process: Any, tmp_path: Path) -> None:
    strategy = {"name": "ps-sync", "wire": "bf16", "resources_per_server": {"right": 1}}
    result = train(big_job(strategy, scaling(2, left=1)), tmp_path)
    assert 1e-7 < distance(weights(result), one_process) < 1e-2


@pytest.mark.slow
def test_object_store_smaller_than_gradients_spills(tmp_path: Path) -> None:
    """Gradients and checkpoints of a step exceed a node's object store: Ray spills them."""
    strategy = {"name": "ps-sync", "num_servers": 2, "resources_per_server": {"right": 1}}
    spec = big_job(strategy, scaling(2, left=1))
    spec |= {"task": "tasks_for_tests:Huge", "checkpoint": {"every_steps": 1}}
    result = train(spec, tmp_path)
    trained, parameters = weights(result), train_in_memory(make_job(spec), Huge).parameters()
    expected = np.concatenate([parameters[name].numpy().ravel() for name in sorted(parameters)])
    assert trained.tobytes() == expected.tobytes()


@pytest.mark.slow
def test_backup_is_on_the_other_node(tmp_path: Path) -> None:
    """Updates are sent as bytes; after a promotion the workers' server is on the other node."""
    done = tmp_path / "done"
    killer = PrimaryKiller(done, signal.SIGKILL, signal.SIGKILL)
    spec = {**long_job({"name": "ps-sync"}, done), "scaling": scaling(2, left=1)}
    result = train(spec, tmp_path, callbacks=(killer,))
    assert len(killer.standstills) == 2, "the run ended before the loss"
    assert len(set(killer.nodes)) == 2
    assert weights(result).tobytes() == unfailed_weights(spec)


@pytest.mark.slow
def test_tables_on_two_nodes_match_one_process(tmp_path: Path) -> None:
    """One table server on each node; both workers on one node."""
    spec = words_job("ring", 2)
    embeddings = {**spec["embeddings"], "resources_per_server": {"slot": 2}}
    result = train({**spec, "embeddings": embeddings, "scaling": scaling(2, left=1)}, tmp_path)
    expected = read_tables(train(words_job("ring", 0), tmp_path))
    for name, rows in read_tables(result).items():
        np.testing.assert_allclose(rows, expected[name], rtol=1e-5, atol=1e-6)


class NodeKiller(Callback):
    """Removes a node after the first step. A `Callback`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.node: Any = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        cluster.wait_for_nodes()

    def on_step(self, step: StepSummary) -> None:
        if self.node is not None:
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.node = None


@pytest.mark.slow
def test_controller_survives_the_loss_of_another_node(two_nodes: Cluster, tmp_path: Path) -> None:
    killer = NodeKiller(two_nodes)
    result = train(big_job("ring", scaling(1, left=1)), tmp_path, callbacks=(killer,))
    assert killer.node is None
    assert [summary.step for summary in result.history] == [1, 2, 3, 4, 5]
    assert not result.failures
