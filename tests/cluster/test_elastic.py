"""Workers are lost and replaced; the result has the same bits as that of a run without a loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_runs import distance, job, train, weights

from distplat import Result
from distplat.platform.errors import RestartsExhausted
from distplat.platform.progress import FailureEvent, Recovery

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(240)]

STEPS = 30
FAILURE = {"step_timeout_s": 30, "heartbeat_timeout_s": 20}


class Watch:
    """Notes what disturbed a run. An `Observer`."""

    def __init__(self) -> None:
        self.setbacks: list[FailureEvent] = []
        self.recoveries: list[Recovery] = []

    def started(self, job: object, run: str, path: Path) -> None:
        pass

    def stepped(self, summary: object) -> None:
        pass

    def disturbed(self, news: FailureEvent | Recovery) -> None:
        if isinstance(news, FailureEvent):
            self.setbacks.append(news)
        else:
            self.recoveries.append(news)


def run(
    tmp_path: Path, deeds: list[str], strategy: object = None, *, loaders: int = 0, **failure: Any
) -> tuple[Result, Watch]:
    folder = tmp_path / f"marks-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    spec = job(
        strategy or {"name": "ring", "timeout_s": 4},
        3,
        task="tasks_for_tests:Elastic",
        task_args={"folder": str(folder), "deeds": deeds},
        optimizer={"name": "AdamW", "lr": 0.02},
        epochs=None,
        steps=STEPS,
        global_batch_size=12,
        data={"drop_last": True, "num_loaders": loaders},
        clip_norm=1.0,
        failure={**FAILURE, **failure},
    )
    watch = Watch()
    return train(spec, tmp_path, observers=(watch,)), watch


_unfailed: dict[str, tuple[NDArray[np.float32], Result]] = {}


def unfailed(tmp_path: Path, strategy: object = None) -> tuple[NDArray[np.float32], Result]:
    """The same run without a loss; made once."""
    key = repr(strategy)
    if key not in _unfailed:
        result, watch = run(tmp_path, [], strategy)
        assert not watch.setbacks
        _unfailed[key] = weights(result), result
    return _unfailed[key]


def same(result: Result, tmp_path: Path, strategy: object = None) -> None:
    """Same weights and buffers, bit for bit; each step once, with the same evaluations."""
    bits, other = unfailed(tmp_path, strategy)
    assert np.array_equal(weights(result), bits)
    assert [s.step for s in result.history] == list(range(1, STEPS + 1))
    assert result.evaluations == other.evaluations
    for mine, others in zip(result.history, other.history, strict=True):
        # What a lost rank had not yet reported is missing in the means, and in the samples.
        assert mine.loss == others.loss or mine.samples < others.samples


@pytest.mark.parametrize(
    ("deed", "victim", "backend"),
    [("kill", 0, "shm"), ("stop", 2, "shm"), ("stop", 0, "gloo")],
)
def test_one_worker_is_replaced(deed: str, victim: int, backend: str, tmp_path: Path) -> None:
    strategy = {"name": "ring", "timeout_s": 4, "backend": backend}
    result, watch = run(tmp_path, [f"{deed} {victim} at 9"], strategy)
    same(result, tmp_path, strategy)
    assert [s.replaced for s in watch.setbacks] == [(f"worker-{victim}",)]
    assert watch.setbacks[0].step == 9, "only the step in flight is repeated"
    assert [r.attempt for r in watch.recoveries] == [1]


@pytest.mark.parametrize("deed", ["kill", "stop"])
def test_loaders_end_with_their_worker(deed: str, tmp_path: Path) -> None:
    """The census sees them, should they not."""
    result, watch = run(tmp_path, [f"{deed} 1 at 9"], loaders=1)
    same(result, tmp_path)
    assert [s.replaced for s in watch.setbacks] == [("worker-1",)]


@pytest.mark.parametrize("at", ["0", "29", "evaluation"])
def test_the_first_and_the_last_moments(at: str, tmp_path: Path) -> None:
    result, watch = run(tmp_path, [f"kill 1 at {at}"])
    same(result, tmp_path)
    assert len(watch.setbacks) == 1


def test_a_newcomer_dies_while_it_starts(tmp_path: Path) -> None:
    result, watch = run(tmp_path, ["kill 1 at 12", "kill 1 at start"])
    same(result, tmp_path)
    assert [s.replaced for s in watch.setbacks] == [("worker-1",)] * 2


def test_two_at_once_then_another(tmp_path: Path) -> None:
    result, _ = run(tmp_path, ["kill 0 at 7", "kill 1 at 7", "stop 2 at 20"])
    same(result, tmp_path)


def test_all_at_once_begin_anew(tmp_path: Path) -> None:
    result, watch = run(tmp_path, ["kill all at 11"])
    same(result, tmp_path)
    assert [(s.step, len(s.replaced)) for s in watch.setbacks][-1] == (0, 3)


def test_where_state_dies_with_a_worker_all_begin_anew(tmp_path: Path) -> None:
    strategy = {"name": "ring", "shard_optimizer": True}
    result, watch = run(tmp_path, ["kill 1 at 11"], strategy, max_failures=1)
    same(result, tmp_path, strategy)
    assert [(s.step, len(s.replaced)) for s in watch.setbacks] == [(0, 3)]


def test_compressed_gradients(tmp_path: Path) -> None:
    halves = {"name": "ring", "compression": "bf16"}
    result, _ = run(tmp_path, ["kill 1 at 9"], halves)
    same(result, tmp_path, halves)


def test_residuals_are_lost_with_a_worker(tmp_path: Path) -> None:
    """So the bits differ; but training goes on from where it was."""
    factors = {"name": "ring", "compression": "powersgd", "powersgd_rank": 1}
    result, watch = run(tmp_path, ["kill 1 at 20"], factors)
    assert [s.step for s in watch.setbacks] == [20]
    assert distance(weights(result), unfailed(tmp_path, factors)[0]) < 0.2


def test_a_crash_loop_ends_with_all_its_failures(tmp_path: Path) -> None:
    deeds = ["kill 1 at 7"] * 5
    with pytest.raises(RestartsExhausted) as caught:
        run(tmp_path, deeds, max_failures=10)
    assert caught.value.exit_code == 4
    assert len(caught.value.setbacks) == 3
    told = caught.value.setbacks
    assert all("worker-1 was lost" in text or "missing ranks: 1" in text for text in told)
