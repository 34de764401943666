"""`distplat.weights` returns snapshots of a running job, each of the stated version."""

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from local_run import train as train_in_memory
from marks import slow
from small_runs import BesideTraining, job, train
from tasks_for_tests import Blobs

import distplat
from distplat.actors.weights import WeightsSnapshot
from distplat.platform.errors import ActorLost, DeadlineExceeded, DistplatError, SpecError
from distplat.strategies.catalog import make_job

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


class Evaluator(BesideTraining):
    """Takes snapshots of ascending versions, then stops the run. A `Callback`."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.snapshots: list[WeightsSnapshot] = []
        self.errors: list[BaseException] = []

    def should_stop(self) -> bool:
        return len(self.snapshots) >= self.count

    def run(self) -> None:
        assert self.training.wait(60)
        out = distplat.weights("small")
        assert out.run == self.run_name
        try:
            with pytest.raises(DeadlineExceeded, match=r"above version 1000000: waited 0\.1 s"):
                out.latest(newer_than=1_000_000, timeout_s=0.1)
            while len(self.snapshots) < self.count:
                newest = self.snapshots[-1].version if self.snapshots else 0
                self.snapshots.append(out.latest(newer_than=newest, timeout_s=30))
            out.latest(newer_than=1_000_000, timeout_s=30)
        except BaseException as error:
            self.errors.append(error)


@pytest.mark.parametrize(
    "strategy",
    [
        "ring",
        slow({"name": "ps-sync", "num_servers": 2}),
        slow({"name": "hybrid", "pipeline": 2, "cut": "even", "micro_batches": 2}),
    ],
    ids=str,
)
def test_snapshot_matches_a_shorter_run(strategy: object, tmp_path: Path) -> None:
    evaluator = Evaluator(3)
    args = {"marker": str(tmp_path / "never"), "fault": "none", "at": 0}
    fields: dict[str, Any] = {
        "task": "tasks_for_tests:Misbehaving",  # sleeps in each step
        "task_args": args,
        "epochs": None,
        "evaluation": {"every_epochs": 0},
    }
    result = train(job(strategy, 2, **fields, steps=2000), tmp_path, callbacks=(evaluator,))
    evaluator.join(30)
    versions = [snapshot.version for snapshot in evaluator.snapshots]
    assert versions == sorted(set(versions)) and len(versions) == 3
    assert 0 < versions[0] and versions[-1] <= result.totals.steps < 2000
    assert isinstance(evaluator.errors[0], ActorLost), evaluator.errors
    assert "is over" in str(evaluator.errors[0])
    chosen = evaluator.snapshots[1]
    shorter = make_job(job(strategy, 2, **{**fields, "task_args": {}}, steps=chosen.version))
    parts = train_in_memory(shorter, Blobs).trained
    expected = {name: tensor for part in parts for name, tensor in part.items()}
    assert chosen.state.keys() == expected.keys()
    assert all(torch.equal(chosen.state[name], expected[name]) for name in expected)


def test_unknown_run_is_refused() -> None:
    with pytest.raises(SpecError, match="no run or job 'digits' is running"):
        distplat.weights("digits")


def test_raises_error_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(DistplatError, match="not connected to Ray"):
        distplat.weights("digits")
