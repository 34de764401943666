"""Pipelines over Ray: what one worker gives, the same bits each time, and stages that are lost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group
from small_runs import FAILURE, Watch, distance, job, train, weights

from distplat import Result
from distplat.platform.progress import StepSummary

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

STEPS = 20
WRITTEN = (5, 10, 15)
"""Checkpoints that may be the newest in step 19: they are written while training goes on."""
GRID = {"name": "hybrid", "pipeline": 2, "data": 2, "micro_batches": 3, "cut": ["3"]}
SERVED = {**GRID, "data_strategy": "ps-sync", "timeout_s": 60}


def run(
    tmp_path: Path,
    deeds: list[str],
    strategy: dict[str, Any] = GRID,
    watch: Watch | None = None,
    **more: Any,
) -> tuple[Result, Watch]:
    folder = tmp_path / f"marks-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    workers = strategy.get("pipeline", 1) * strategy.get("data", 1)
    spec = job(
        {"timeout_s": 6, **strategy},
        workers,
        task="hybrid_tasks:Staged",
        task_args={"folder": str(folder), "deeds": deeds},
        optimizer={"name": "AdamW", "lr": 0.02},
        epochs=None,
        steps=STEPS,
        global_batch_size=12,
        clip_norm=1.0,
        evaluation={"every_epochs": 3},
        data={"drop_last": True},
        **{"failure": FAILURE, **more},
    )
    watch = watch or Watch()
    return train(spec, tmp_path, callbacks=(watch,)), watch


class Evictor(Watch):
    """Takes a placement group away once some steps were made. A `Callback`."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted = False

    def on_step(self, step: StepSummary) -> None:
        if self.evicted or step.step < 3:
            return
        self.evicted = True
        table = ray.util.placement_group_table()
        found = [key for key, facts in table.items() if facts["state"] == "CREATED"]
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(found[0])))


_unfailed: dict[str, tuple[NDArray[np.float32], Result]] = {}


def unfailed(tmp_path: Path, strategy: dict[str, Any]) -> tuple[NDArray[np.float32], Result]:
    """The same run without a loss; made once."""
    key = repr(strategy)
    if key not in _unfailed:
        result, watch = run(tmp_path, [], strategy)
        assert not watch.failures
        _unfailed[key] = weights(result), result
    return _unfailed[key]


def same(result: Result, tmp_path: Path, strategy: dict[str, Any] = GRID) -> None:
    """Same weights and buffers, bit for bit; each step once, with the same evaluations."""
    bits, other = unfailed(tmp_path, strategy)
    assert np.array_equal(weights(result), bits)
    assert [s.step for s in result.history] == list(range(1, STEPS + 1))
    assert result.evaluations == other.evaluations
    for mine, others in zip(result.history, other.history, strict=True):
        assert mine.loss == others.loss or mine.samples < others.samples


def test_two_stages_and_two_replicas(tmp_path: Path) -> None:
    """The trace tells of every rank and micro-batch; that a run repeats, the tests below show."""
    _, result = unfailed(tmp_path, GRID)
    trace = json.loads((result.path / "pipeline_trace.json").read_text())
    assert (trace["stages"], trace["schedule"], trace["micro_batches"]) == (2, "1f1b", 3)
    done = {(e["rank"], e["kind"], e["micro_batch"]) for e in trace["events"]}
    assert {(r, k, i) for r in range(4) for k in "FB" for i in range(3)} <= done
    assert all(0 <= e["start_s"] <= e["end_s"] for e in trace["events"])
    assert all(0 < s.figures["stage_busy_s"] < s.figures["pipeline_s"] for s in result.history)


def test_without_dropout_it_is_what_one_worker_gives(tmp_path: Path) -> None:
    """Over gloo; interleaved, so that activations and gradients share the way."""
    small = {"task": "tasks_for_tests:Deep", "steps": 12, "epochs": None}
    strategy = {"name": "hybrid", "pipeline": 2, "schedule": "interleaved", "backend": "gloo"}
    cut = train(job(strategy, 2, **small), tmp_path)
    whole = train(job("ring", 0, **small), tmp_path)
    assert distance(weights(cut), weights(whole)) < 1e-5
    assert cut.metrics == pytest.approx(whole.metrics, rel=1e-4)


@pytest.mark.slow
def test_a_lost_stage_gets_its_state_from_its_twin(tmp_path: Path) -> None:
    """Killed in a forward and in a backward, and frozen. With dropout: the same bits."""
    lost = {"kill 1 forward 19": 1, "kill 2 backward 29": 2, "stop 0 forward 41": 0}
    result, watch = run(tmp_path, [*lost])
    same(result, tmp_path)
    assert [s.replaced for s in watch.failures] == [(f"worker-{rank}",) for rank in lost.values()]
    # The step in flight is repeated, no more.
    assert [s.step for s in watch.failures] == [int(deed.split()[-1]) // 3 for deed in lost]
    assert "0" in watch.failures[-1].cause


@pytest.mark.slow
def test_servers_of_each_stage_are_lost(tmp_path: Path) -> None:
    """One that has a backup, which costs nothing; and without, after a worker: the same bits."""
    backed, watch = run(tmp_path, ["server 1 forward 30"], {**SERVED, "replication": 2})
    assert not watch.failures, "no worker is replaced, and no step repeated"
    _unfailed[repr(SERVED)] = weights(backed), backed
    deeds = ["kill 1 backward 20", "server 1 backward 56"]
    result, watch = run(tmp_path, deeds, SERVED, checkpoint={"every_steps": 5})
    same(result, tmp_path, SERVED)
    first, second = watch.failures
    assert (first.replaced, first.step) == (("worker-1",), 6), "the step in flight is repeated"
    assert len(second.replaced) == 4 and second.step in WRITTEN
    assert all(s.figures["apply_s"] >= 0 for s in result.history)


@pytest.mark.slow
def test_a_replica_whose_placement_group_is_removed(tmp_path: Path) -> None:
    """Its two ranks are made anew, in a group of their own; the others keep what they have."""
    result, watch = run(tmp_path, [], watch=Evictor())
    same(result, tmp_path)
    (failure,) = watch.failures
    assert failure.replaced in (("worker-0", "worker-1"), ("worker-2", "worker-3"))
    assert "placement group was removed" in failure.cause


@pytest.mark.slow
def test_both_twins_lost(tmp_path: Path) -> None:
    deeds = ["late 1 forward 57", "late 3 forward 57"]
    result, watch = run(tmp_path, deeds, checkpoint={"every_steps": 5})
    same(result, tmp_path)
    assert watch.failures[-1].step in WRITTEN and len(watch.failures[-1].replaced) == 4
