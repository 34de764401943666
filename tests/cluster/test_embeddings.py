"""Embeddings on servers, through real actors: the same tables as in one process."""

import re
from pathlib import Path

import numpy as np
import pytest
import ray
from marks import slow
from small_runs import BesideTraining, distance, train, weights
from table_runs import tables, words

from distplat import Result

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One rank in one process, without Ray."""
    return train(words("ring", 0), tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Two ranks that lose nothing."""
    return train(words("ring", 2), tmp_path_factory.mktemp("plain"))


def test_equals_one_process(alone: Result, plain: Result) -> None:
    assert distance(weights(plain), weights(alone)) < 1e-5
    mine, expected = tables(plain), tables(alone)
    for name, rows in expected.items():
        assert mine[name].shape == rows.shape
        np.testing.assert_allclose(mine[name], rows, rtol=1e-5, atol=1e-6)
    assert plain.evaluations[-1].metrics["loss"] == pytest.approx(
        alone.evaluations[-1].metrics["loss"], rel=1e-4
    )


def same_bits(lossy: Result, plain: Result) -> None:
    assert weights(lossy).tobytes() == weights(plain).tobytes()
    mine, expected = tables(lossy), tables(plain)
    assert all(mine[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_replaced_worker_leaves_the_same_bits(
    plain: Result, strategy: str, tmp_path: Path
) -> None:
    args = {"marker": str(tmp_path / "done"), "at": 6}
    lossy = train(words(strategy, 2, task="words:Deadly", task_args=args), tmp_path)
    assert len(lossy.failures) == 1
    same_bits(lossy, plain)


class KillPrimary(BesideTraining):
    """Kills a server that keeps tables, once all have backups. A `Callback`."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = ""
        self.followed = ""  #: who keeps its rows since

    def run(self) -> None:
        assert self.training.wait(60)
        manager = ray.get_actor("small/server-manager", namespace=self.run_name)
        assignments = ray.get(manager.table_assignments.remote(), timeout=60)
        assert all(assignment.ready for assignment in assignments), (
            "workers have their rows when all are kept twice"
        )
        ray.kill(ray.get_actor(f"small/{assignments[0].primary}", namespace=self.run_name))
        self.lost = assignments[0].primary
        found = ray.get(manager.table_servers.remote(1, 60.0), timeout=60)
        self.followed = found.names[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [slow("ring"), "ps-sync"])
def test_a_lost_server_with_a_backup_costs_no_step(
    plain: Result, strategy: str, tmp_path: Path
) -> None:
    killer, args = KillPrimary(), {"marker": "", "at": 0, "pause": 0.3}
    spec = words(strategy, 2, task="words:Deadly", task_args=args)
    spec["embeddings"] = {**spec["embeddings"], "replication": 2}
    result = train(spec, tmp_path, callbacks=(killer,))
    assert (killer.lost, killer.followed) == ("embedding-server-0", "embedding-server-2")
    assert result.failures == []
    assert [summary.step for summary in result.history] == list(range(1, len(plain.history) + 1))
    same_bits(result, plain)


@pytest.mark.slow
def test_a_lost_server_comes_back_from_the_checkpoint(plain: Result, tmp_path: Path) -> None:
    args = {"marker": str(tmp_path / "done"), "at": 13, "victim": "ServerNode", "pause": 0.2}
    every = {"every_steps": 4}
    spec = words("ring", 2, task="words:Deadly", task_args=args, checkpoint=every)
    lossy = train(spec, tmp_path)
    (failure,) = lossy.failures
    assert failure.step in (4, 8, 12)
    assert re.search(r"embedding-server-\d was lost", failure.cause)
    same_bits(lossy, plain)
