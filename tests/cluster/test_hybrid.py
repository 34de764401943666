"""Pipelines on Ray: comparison with one worker, repeated runs, and lost stages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group
from small_runs import FAILURE, FailureRecorder, distance, job, train, weights

from distplat import Result
from distplat.platform.progress import StepSummary

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

STEPS = 20
WRITTEN = (5, 10, 15)
"""Possible newest checkpoints in step 19: writes overlap with training."""
GRID = {"name": "hybrid", "pipeline": 2, "data": 2, "micro_batches": 3, "cut": ["3"]}
SERVED = {**GRID, "data_strategy": "ps-sync", "timeout_s": 60}


def run(
    tmp_path: Path,
    faults: list[str],
    strategy: dict[str, Any] = GRID,
    recorder: FailureRecorder | None = None,
    **more: Any,
) -> tuple[Result, FailureRecorder]:
    folder = tmp_path / f"marks-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    workers = strategy.get("pipeline", 1) * strategy.get("data", 1)
    spec = job(
        {"timeout_s": 6, **strategy},
        workers,
        task="hybrid_tasks:Staged",
        task_args={"folder": str(folder), "faults": faults},
        optimizer={"name": "AdamW", "lr": 0.02},
        epochs=None,
        steps=STEPS,
        global_batch_size=12,
        clip_norm=1.0,
        evaluation={"every_epochs": 3},
        data={"drop_last": True},
        **{"failure": FAILURE, **more},
    )
    recorder = recorder or FailureRecorder()
    result = train(spec, tmp_path, callbacks=(recorder,))
    assert {path.name for path in folder.iterdir()} == {str(at) for at in range(len(faults))}
    return result, recorder


class Evictor(FailureRecorder):
    """Removes a placement group after three steps. A `Callback`."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted = False

    def on_step(self, step: StepSummary) -> None:
        if self.evicted or step.step < 3:
            return
        self.evicted = True
        table = ray.util.placement_group_table()
        tables = [key for key, facts in table.items() if facts["state"] == "CREATED"]
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(tables[0])))


_unfailed: dict[str, tuple[NDArray[np.float32], Result]] = {}


def unfailed(tmp_path: Path, strategy: dict[str, Any]) -> tuple[NDArray[np.float32], Result]:
    """Return weights and result of the run without a loss, which is cached."""
    key = repr(strategy)
    if key not in _unfailed:
        result, recorder = run(tmp_path, [], strategy)
        assert not recorder.failures
        _unfailed[key] = weights(result), result
    return _unfailed[key]


def assert_matches_unfailed(
    result: Result, tmp_path: Path, strategy: dict[str, Any] = GRID
) -> None:
    """Compare weights, buffers and evaluations; each step is reported once."""
    expected, unfailed_result = unfailed(tmp_path, strategy)
    assert np.array_equal(weights(result), expected)
    assert [s.step for s in result.history] == list(range(1, STEPS + 1))
    assert result.evaluations == unfailed_result.evaluations
    for found, wanted in zip(result.history, unfailed_result.history, strict=True):
        assert found.loss == wanted.loss or found.samples < wanted.samples


def test_trace_of_two_stages_and_two_replicas(tmp_path: Path) -> None:
    """The trace contains every rank and micro-batch."""
    _, result = unfailed(tmp_path, GRID)
    trace = json.loads((result.path / "pipeline_trace.json").read_text())
    assert (trace["stages"], trace["schedule"], trace["micro_batches"]) == (2, "1f1b", 3)
    traced = {(e["rank"], e["kind"], e["micro_batch"]) for e in trace["events"]}
    assert {(r, k, i) for r in range(4) for k in "FB" for i in range(3)} <= traced
    assert all(0 <= e["start_s"] <= e["end_s"] for e in trace["events"])
    assert all(0 < s.figures["stage_busy_s"] < s.figures["pipeline_s"] for s in result.history)


@pytest.mark.slow
def test_pipeline_matches_one_worker(tmp_path: Path) -> None:
    """Over gloo, interleaved: activations and gradients share a channel. No dropout."""
    small = {"task": "tasks_for_tests:Deep", "steps": 12, "epochs": None}
    strategy = {"name": "hybrid", "pipeline": 2, "schedule": "interleaved", "backend": "gloo"}
    pipeline = train(job(strategy, 2, **small), tmp_path)
    one_worker = train(job("ring", 0, **small), tmp_path)
    assert distance(weights(pipeline), weights(one_worker)) < 1e-5
    assert pipeline.metrics == pytest.approx(one_worker.metrics, rel=1e-4)


@pytest.mark.slow
def test_lost_stage_is_restored_from_its_peer(tmp_path: Path) -> None:
    """Killed in a forward, killed in a backward, and frozen. With dropout."""
    lost = {"kill 1 forward 19": 1, "kill 2 backward 29": 2, "stop 0 forward 41": 0}
    result, recorder = run(tmp_path, [*lost])
    assert_matches_unfailed(result, tmp_path)
    assert [s.replaced for s in recorder.failures] == [
        (f"worker-{rank}",) for rank in lost.values()
    ]
    # Only the current step is repeated.
    assert [s.step for s in recorder.failures] == [int(fault.split()[-1]) // 3 for fault in lost]
    assert "0" in recorder.failures[-1].cause


@pytest.mark.slow
def test_lost_servers_of_stages_are_replaced(tmp_path: Path) -> None:
    """A server with a backup, and a server without, after a worker."""
    backed, recorder = run(tmp_path, ["server 1 forward 30"], {**SERVED, "replication": 2})
    assert not recorder.failures, "no worker is replaced, and no step is repeated"
    _unfailed[repr(SERVED)] = weights(backed), backed
    faults = ["kill 1 backward 20", "server 1 backward 56"]
    result, recorder = run(tmp_path, faults, SERVED, checkpoint={"every_steps": 5})
    assert_matches_unfailed(result, tmp_path, SERVED)
    first, second = recorder.failures
    assert (first.replaced, first.step) == (("worker-1",), 6), "the current step is repeated"
    assert len(second.replaced) == 4 and second.step in WRITTEN
    assert all(s.figures["apply_s"] >= 0 for s in result.history)


@pytest.mark.slow
def test_replica_without_placement_group_is_replaced(tmp_path: Path) -> None:
    """Both ranks get a new placement group; the other replica is kept."""
    result, recorder = run(tmp_path, [], recorder=Evictor())
    assert_matches_unfailed(result, tmp_path)
    (failure,) = recorder.failures
    assert failure.replaced in (("worker-0", "worker-1"), ("worker-2", "worker-3"))
    assert "placement group was removed" in failure.cause


@pytest.mark.slow
def test_loss_of_both_peers_restores_checkpoint(tmp_path: Path) -> None:
    faults = ["late 1 forward 57", "late 3 forward 57"]
    result, recorder = run(tmp_path, faults, checkpoint={"every_steps": 5})
    assert_matches_unfailed(result, tmp_path)
    assert recorder.failures[-1].step in WRITTEN and len(recorder.failures[-1].replaced) == 4
