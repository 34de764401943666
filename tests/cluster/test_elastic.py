"""Lost workers are replaced; the model is bit-identical to that of a run without a loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_runs import FAILURE, FailureRecorder, job, train, weights

from distplat import Result
from distplat.platform.errors import RestartsExhausted

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

STEPS = 30
RING = {"name": "ring", "timeout_s": 4}


def run(
    tmp_path: Path, faults: list[str], strategy: object, *, loaders: int = 0, **failure: Any
) -> tuple[Result, FailureRecorder]:
    folder = tmp_path / f"marks-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    spec = job(
        strategy,
        3,
        task="tasks_for_tests:Elastic",
        task_args={"folder": str(folder), "faults": faults},
        optimizer={"name": "AdamW", "lr": 0.02},
        epochs=None,
        steps=STEPS,
        global_batch_size=12,
        data={"drop_last": True, "num_workers": loaders},
        clip_norm=1.0,
        failure={**FAILURE, **failure},
    )
    recorder = FailureRecorder()
    return train(spec, tmp_path, callbacks=(recorder,)), recorder


_unfailed: dict[str, tuple[NDArray[np.float32], Result]] = {}


def unfailed(tmp_path: Path, strategy: object) -> tuple[NDArray[np.float32], Result]:
    """Return weights and result of the run without a loss, which is cached."""
    key = repr(strategy)
    if key not in _unfailed:
        result, recorder = run(tmp_path, [], strategy)
        assert not recorder.failures
        _unfailed[key] = weights(result), result
    return _unfailed[key]


def assert_matches_unfailed(result: Result, tmp_path: Path, strategy: object) -> None:
    """Compare weights, buffers and evaluations; each step is reported once."""
    expected, unfailed_result = unfailed(tmp_path, strategy)
    assert np.array_equal(weights(result), expected)
    assert [s.step for s in result.history] == list(range(1, STEPS + 1))
    assert result.evaluations == unfailed_result.evaluations
    for found, wanted in zip(result.history, unfailed_result.history, strict=True):
        # Unreported losses and samples of a lost rank are missing in the summary.
        assert found.loss == wanted.loss or found.samples < wanted.samples


@pytest.mark.slow
def test_lost_workers_are_replaced_in_any_step(tmp_path: Path) -> None:
    """First and last step, evaluation, a frozen worker, a replacement, two workers at once."""
    faults = ["kill 1 at 0", "kill 0 at 7", "kill 0 at start", "stop 2 at 12", "kill 0 at 20"]
    faults += ["kill 1 at 20", "kill 1 at 29", "kill 1 at evaluation"]
    result, recorder = run(tmp_path, faults, RING, max_failures=10)
    assert_matches_unfailed(result, tmp_path, RING)
    lost = [(s.step, rank) for s in recorder.failures for rank in s.replaced]
    # Only the current step is repeated.
    assert sorted(lost) == [
        (0, "worker-1"),
        *[(7, "worker-0")] * 2,
        (12, "worker-2"),
        (20, "worker-0"),
        (20, "worker-1"),
        (29, "worker-1"),
        (30, "worker-1"),
    ]
    attempts = [s.attempt for s in recorder.failures]
    assert attempts == list(range(1, len(attempts) + 1))
    assert {r.attempt for r in recorder.recoveries} <= {*attempts}


@pytest.mark.slow
def test_loaders_end_with_their_worker(tmp_path: Path) -> None:
    """The leak check finds remaining loaders. With gloo, whose store is in rank 0."""
    strategy = {**RING, "backend": "gloo"}
    result, recorder = run(tmp_path, ["kill 1 at 5", "stop 0 at 9"], strategy, loaders=1)
    assert_matches_unfailed(result, tmp_path, strategy)
    lost = [(s.step, s.replaced) for s in recorder.failures]
    assert lost == [(5, ("worker-1",)), (9, ("worker-0",))]


@pytest.mark.slow
def test_loss_of_all_workers_restarts_the_run(tmp_path: Path) -> None:
    result, recorder = run(tmp_path, ["kill all at 11"], RING)
    assert_matches_unfailed(result, tmp_path, RING)
    assert [(s.step, len(s.replaced)) for s in recorder.failures][-1] == (0, 3)


@pytest.mark.slow
def test_loss_of_sharded_state_restarts_the_run(tmp_path: Path) -> None:
    strategy = {"name": "ring", "shard_optimizer": True}
    result, recorder = run(tmp_path, ["kill 1 at 11"], strategy, max_failures=1)
    assert_matches_unfailed(result, tmp_path, strategy)
    assert [(s.step, len(s.replaced)) for s in recorder.failures] == [(0, 3)]


@pytest.mark.slow
def test_crash_loop_ends_the_run_and_lists_failures(tmp_path: Path) -> None:
    faults = ["kill 1 at 7"] * 5
    with pytest.raises(RestartsExhausted) as caught:
        run(tmp_path, faults, RING, max_failures=10)
    assert caught.value.exit_code == 4
    assert len(caught.value.failures) == 3
    messages = caught.value.failures
    assert all("worker-1 was lost" in text or "missing ranks: 1" in text for text in messages)
