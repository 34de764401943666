"""Two Ray nodes (on one host): bytes take another road, results do not change."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from local_run import train as train_in_memory
from ray.cluster_utils import Cluster
from server_losses import Losing, long_job, undisturbed
from small_runs import HERE, distance, job, train, weights
from table_runs import tables, words
from tasks_for_tests import Big, Huge

from distplat import Callback
from distplat.cli.main import run
from distplat.platform.progress import StepSummary
from distplat.strategies.catalog import make_job

pytestmark = pytest.mark.cluster

SLOTS = {"CPU": 0.5, "slot": 1}


@pytest.fixture(scope="module", autouse=True)
def two_nodes() -> Iterator[Cluster]:
    """Two nodes with two slots each: of four actors with a slot, two share a node."""
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
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The models of one process, by number of workers' independent job fields."""
    return weights(train(big("ring", {"num_workers": 0}), tmp_path_factory.mktemp("alone")))


def big(strategy: object, scaling: dict[str, Any]) -> dict[str, Any]:
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
def test_roads_between_nodes(
    strategy: object, scale: dict[str, Any], alone: Any, tmp_path: Path
) -> None:
    result = train(big(strategy, scale), tmp_path)
    assert distance(weights(result), alone) < 1e-5


@pytest.mark.slow
def test_asynchronous_between_nodes(tmp_path: Path) -> None:
    """What a worker pulled came whole: else the run could not be made again to the same bits."""
    strategy = {"name": "ps-async", "num_servers": 2, "resources_per_server": {"right": 1}}
    result = train(big(strategy, scaling(2, left=1)), tmp_path)
    assert run(["replay", str(result.path), "--working-dir", str(HERE)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("servers", "scale"),
    [
        pytest.param({"right": 1}, scaling(2, left=1), id="all-servers-elsewhere"),
        pytest.param({"slot": 1}, scaling(1, slot=1), id="one-server-near-two-far"),
    ],
)
def test_the_bits_do_not_depend_on_where_servers_are(
    servers: dict[str, float], scale: dict[str, Any], tmp_path: Path
) -> None:
    strategy = {"name": "ps-sync", "num_servers": 3, "resources_per_server": servers}
    spec = big(strategy, scale)
    result = train(spec, tmp_path)
    parameters = train_in_memory(make_job(spec), Big).parameters()
    expected = np.concatenate([parameters[name].numpy().ravel() for name in sorted(parameters)])
    assert weights(result).tobytes() == expected.tobytes()


@pytest.mark.slow
def test_halves_between_nodes(alone: Any, tmp_path: Path) -> None:
    strategy = {"name": "ps-sync", "wire": "bf16", "resources_per_server": {"right": 1}}
    result = train(big(strategy, scaling(2, left=1)), tmp_path)
    assert 1e-7 < distance(weights(result), alone) < 1e-2


@pytest.mark.slow
def test_an_object_store_that_is_too_small_makes_a_run_slow_only(tmp_path: Path) -> None:
    """Gradients of a step and checkpoints are more than a node's store holds: Ray spills them."""
    strategy = {"name": "ps-sync", "num_servers": 2, "resources_per_server": {"right": 1}}
    spec = big(strategy, scaling(2, left=1))
    spec |= {"task": "tasks_for_tests:Huge", "checkpoint": {"every_steps": 1}}
    result = train(spec, tmp_path)
    trained, parameters = weights(result), train_in_memory(make_job(spec), Huge).parameters()
    expected = np.concatenate([parameters[name].numpy().ravel() for name in sorted(parameters)])
    assert trained.tobytes() == expected.tobytes()


@pytest.mark.slow
def test_a_backup_is_on_the_other_node(tmp_path: Path) -> None:
    """Its updates are bytes in a call; workers near one server are far from the one after it."""
    done = tmp_path / "done"
    losing = Losing(done, signal.SIGKILL, signal.SIGKILL)
    spec = {**long_job({"name": "ps-sync"}, done), "scaling": scaling(2, left=1)}
    result = train(spec, tmp_path, callbacks=(losing,))
    assert len(losing.standstills) == 2, "the run was over too soon"
    assert len(set(losing.nodes)) == 2
    assert weights(result).tobytes() == undisturbed(spec)


@pytest.mark.slow
def test_rows_between_nodes(tmp_path: Path) -> None:
    """A server of tables on each node, both workers on one of them."""
    spec = words("ring", 2)
    everywhere = {**spec["embeddings"], "resources_per_server": {"slot": 2}}
    result = train({**spec, "embeddings": everywhere, "scaling": scaling(2, left=1)}, tmp_path)
    expected = tables(train(words("ring", 0), tmp_path))
    for name, rows in tables(result).items():
        np.testing.assert_allclose(rows, expected[name], rtol=1e-5, atol=1e-6)


class LosingNode(Callback):
    """Ends a node after the first step. A `Callback`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.node: Any = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        cluster.wait_for_nodes()

    def on_step(self, step: StepSummary) -> None:
        if self.node is not None:
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.node = None


@pytest.mark.slow
def test_the_end_of_another_node_does_not_take_the_controller(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    losing = LosingNode(two_nodes)
    result = train(big("ring", scaling(1, left=1)), tmp_path, callbacks=(losing,))
    assert losing.node is None
    assert [summary.step for summary in result.history] == [1, 2, 3, 4, 5]
    assert not result.failures
