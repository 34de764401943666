"""Embeddings on servers, on real actors: the same tables as in one process."""

import re
from pathlib import Path

import numpy as np
import pytest
import ray
from marks import slow
from small_runs import BesideTraining, distance, train, weights
from table_runs import read_tables, words_job

from distplat import Result

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Train one rank in this process, without Ray."""
    return train(words_job("ring", 0), tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def unfailed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Train two ranks without a loss."""
    return train(words_job("ring", 2), tmp_path_factory.mktemp("plain"))


def test_matches_one_process(one_process: Result, unfailed: Result) -> None:
    assert distance(weights(unfailed), weights(one_process)) < 1e-5
    found, expected = read_tables(unfailed), read_tables(one_process)
    for name, rows in expected.items():
        assert found[name].shape == rows.shape
        np.testing.assert_allclose(found[name], rows, rtol=1e-5, atol=1e-6)
    assert unfailed.evaluations[-1].metrics["loss"] == pytest.approx(
        one_process.evaluations[-1].metrics["loss"], rel=1e-4
    )


def assert_same_bits(lossy: Result, unfailed: Result) -> None:
    assert weights(lossy).tobytes() == weights(unfailed).tobytes()
    found, expected = read_tables(lossy), read_tables(unfailed)
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_replaced_worker_does_not_change_the_model(
    unfailed: Result, strategy: str, tmp_path: Path
) -> None:
    args = {"marker": str(tmp_path / "done"), "at": 6}
    lossy = train(words_job(strategy, 2, task="words:Deadly", task_args=args), tmp_path)
    assert len(lossy.failures) == 1
    assert_same_bits(lossy, unfailed)


class KillPrimary(BesideTraining):
    """Kills a table server once all servers have backups. A `Callback`."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = ""
        self.promoted = ""  #: name of the promoted backup

    def run(self) -> None:
        assert self.training.wait(60)
        manager = ray.get_actor("small/server-manager", namespace=self.run_name)
        assignments = ray.get(manager.table_assignments.remote(), timeout=60)
        assert all(assignment.ready for assignment in assignments), (
            "tables are complete once all backups are ready"
        )
        ray.kill(ray.get_actor(f"small/{assignments[0].primary}", namespace=self.run_name))
        self.lost = assignments[0].primary
        found = ray.get(manager.table_servers.remote(1, 60.0), timeout=60)
        self.promoted = found.names[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [slow("ring"), "ps-sync"])
def test_lost_server_with_backup_repeats_no_step(
    unfailed: Result, strategy: str, tmp_path: Path
) -> None:
    killer, args = KillPrimary(), {"marker": "", "at": 0, "pause": 0.3}
    spec = words_job(strategy, 2, task="words:Deadly", task_args=args)
    spec["embeddings"] = {**spec["embeddings"], "replication": 2}
    result = train(spec, tmp_path, callbacks=(killer,))
    assert (killer.lost, killer.promoted) == ("embedding-server-0", "embedding-server-2")
    assert result.failures == []
    assert [summary.step for summary in result.history] == list(range(1, len(unfailed.history) + 1))
    assert_same_bits(result, unfailed)


@pytest.mark.slow
def test_lost_server_is_restored_from_checkpoint(unfailed: Result, tmp_path: Path) -> None:
    args = {"marker": str(tmp_path / "done"), "at": 13, "victim": "ServerNode", "pause": 0.2}
    every = {"every_steps": 4}
    spec = words_job("ring", 2, task="words:Deadly", task_args=args, checkpoint=every)
    lossy = train(spec, tmp_path)
    (failure,) = lossy.failures
    assert failure.step in (4, 8, 12)
    assert re.search(r"embedding-server-\d was lost", failure.cause)
    assert_same_bits(lossy, unfailed)
