"""Workers are lost and replaced; the result has the same bits as that of a run without a loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_runs import FAILURE, Watch, job, train, weights

from distplat import Result
from distplat.platform.errors import RestartsExhausted

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

STEPS = 30
RING = {"name": "ring", "timeout_s": 4}


def run(
    tmp_path: Path, deeds: list[str], strategy: object, *, loaders: int = 0, **failure: Any
) -> tuple[Result, Watch]:
    folder = tmp_path / f"marks-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    spec = job(
        strategy,
        3,
        task="tasks_for_tests:Elastic",
        task_args={"folder": str(folder), "deeds": deeds},
        optimizer={"name": "AdamW", "lr": 0.02},
        epochs=None,
        steps=STEPS,
        global_batch_size=12,
        data={"drop_last": True, "num_workers": loaders},
        clip_norm=1.0,
        failure={**FAILURE, **failure},
    )
    watch = Watch()
    return train(spec, tmp_path, callbacks=(watch,)), watch


_unfailed: dict[str, tuple[NDArray[np.float32], Result]] = {}


def unfailed(tmp_path: Path, strategy: object) -> tuple[NDArray[np.float32], Result]:
    """The same run without a loss; made once."""
    key = repr(strategy)
    if key not in _unfailed:
        result, watch = run(tmp_path, [], strategy)
        assert not watch.failures
        _unfailed[key] = weights(result), result
    return _unfailed[key]


def same(result: Result, tmp_path: Path, strategy: object) -> None:
    """Same weights and buffers, bit for bit; each step once, with the same evaluations."""
    bits, other = unfailed(tmp_path, strategy)
    assert np.array_equal(weights(result), bits)
    assert [s.step for s in result.history] == list(range(1, STEPS + 1))
    assert result.evaluations == other.evaluations
    for mine, others in zip(result.history, other.history, strict=True):
        # What a lost rank had not yet reported is missing in the means, and in the samples.
        assert mine.loss == others.loss or mine.samples < others.samples


@pytest.mark.slow
def test_whoever_is_lost_is_replaced_whenever_it_is(tmp_path: Path) -> None:
    """In the first and last step, in the evaluation; one that froze, a newcomer, two at once."""
    deeds = ["kill 1 at 0", "kill 0 at 7", "kill 0 at start", "stop 2 at 12", "kill 0 at 20"]
    deeds += ["kill 1 at 20", "kill 1 at 29", "kill 1 at evaluation"]
    result, watch = run(tmp_path, deeds, RING, max_failures=10)
    same(result, tmp_path, RING)
    lost = [(s.step, rank) for s in watch.failures for rank in s.replaced]
    # Only the step in flight is repeated.
    assert sorted(lost) == [
        (0, "worker-1"),
        *[(7, "worker-0")] * 2,
        (12, "worker-2"),
        (20, "worker-0"),
        (20, "worker-1"),
        (29, "worker-1"),
        (30, "worker-1"),
    ]
    attempts = [s.attempt for s in watch.failures]
    assert attempts == list(range(1, len(attempts) + 1))
    assert {r.attempt for r in watch.recoveries} <= {*attempts}


@pytest.mark.slow
def test_loaders_end_with_their_worker(tmp_path: Path) -> None:
    """The census sees them, should they not. Over gloo, whose store is rank 0's."""
    strategy = {**RING, "backend": "gloo"}
    result, watch = run(tmp_path, ["kill 1 at 5", "stop 0 at 9"], strategy, loaders=1)
    same(result, tmp_path, strategy)
    lost = [(s.step, s.replaced) for s in watch.failures]
    assert lost == [(5, ("worker-1",)), (9, ("worker-0",))]


@pytest.mark.slow
def test_all_at_once_begin_anew(tmp_path: Path) -> None:
    result, watch = run(tmp_path, ["kill all at 11"], RING)
    same(result, tmp_path, RING)
    assert [(s.step, len(s.replaced)) for s in watch.failures][-1] == (0, 3)


@pytest.mark.slow
def test_where_state_dies_with_a_worker_all_begin_anew(tmp_path: Path) -> None:
    strategy = {"name": "ring", "shard_optimizer": True}
    result, watch = run(tmp_path, ["kill 1 at 11"], strategy, max_failures=1)
    same(result, tmp_path, strategy)
    assert [(s.step, len(s.replaced)) for s in watch.failures] == [(0, 3)]


@pytest.mark.slow
def test_a_crash_loop_ends_with_all_its_failures(tmp_path: Path) -> None:
    deeds = ["kill 1 at 7"] * 5
    with pytest.raises(RestartsExhausted) as caught:
        run(tmp_path, deeds, RING, max_failures=10)
    assert caught.value.exit_code == 4
    assert len(caught.value.failures) == 3
    told = caught.value.failures
    assert all("worker-1 was lost" in text or "missing ranks: 1" in text for text in told)
