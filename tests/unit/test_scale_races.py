"""Scale and stop requests that race with each other or with the loss of a process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import fields_of
from killing_task import KillsInForward
from ray_in_memory import InMemoryRay
from torch import Tensor

from distplat import Callback, Trainer
from distplat.actors.result import Result
from distplat.platform.disk import Disk, FileContent
from distplat.platform.errors import Interrupted
from distplat.platform.progress import StepSummary

STEPS, LONG = 20, 1000


class Slow(KillsInForward):
    """Task whose steps are slow enough for requests to arrive during them."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().loss(outputs, targets)


Action = Callable[[InMemoryRay], object]


class ActAtStep(Callback):
    """Start all actions in parallel when a step is reported."""

    def __init__(self, ray: InMemoryRay, step: int, actions: tuple[Action, ...]) -> None:
        self.step = step
        self.errors: list[Exception] = []
        self.threads = [
            threading.Thread(target=self._run, args=(ray, action), daemon=True)
            for action in actions
        ]

    def on_step(self, step: StepSummary) -> None:
        if step.step == self.step:
            for thread in self.threads:
                thread.start()

    def _run(self, ray: InMemoryRay, action: Action) -> None:
        try:
            action(ray)
        except Exception as error:  # the run may be over
            self.errors.append(error)


def scale(workers: int) -> Action:
    return lambda ray: ray.call_actor("controller", "scale", workers)


def stop(ray: InMemoryRay) -> Any:
    return ray.call_actor("controller", "stop", 5.0)


def lose(role: str, then: Action) -> Action:
    def kill_and_act(ray: InMemoryRay) -> None:
        assert ray.kill_process(role)
        then(ray)

    return kill_and_act


@pytest.fixture
def cluster() -> Iterator[InMemoryRay]:
    with InMemoryRay() as ray:
        KillsInForward.ray, KillsInForward.killed = ray, ""
        yield ray


def fit(
    ray: InMemoryRay, folder: Path, strategy: str, callback: ActAtStep, steps: int = STEPS
) -> Result:
    fields = fields_of(
        strategy, 2, steps=steps, checkpoint={"every_steps": 4}, storage_path=str(folder)
    )
    trainer = Trainer(fields, Slow, callbacks=[callback], progress=False, log_to_driver=False)
    result: Result = ray.as_driver(trainer.fit)
    return result


RACES: dict[str, tuple[int, tuple[Action, ...]]] = {
    "three at once": (4, (scale(3), scale(1), scale(4))),
    "the current number": (4, (scale(2), scale(2))),
    "the last step": (STEPS - 1, (scale(3),)),
    "a worker is replaced": (4, (lose("worker-1", scale(3)),)),
    "a server is lost": (5, (lose("server-0", scale(3)),)),
    "the scheduler is replaced": (4, (lose("task-scheduler", scale(1)),)),
}


@pytest.mark.timeout(90)
@pytest.mark.sweep(6)
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
@pytest.mark.parametrize("race", RACES)
def test_each_step_runs_once_if_scale_requests_race(
    cluster: InMemoryRay, tmp_path: Path, race: str, strategy: str
) -> None:
    step, actions = RACES[race]
    callback = ActAtStep(cluster, step, actions)
    result = fit(cluster, tmp_path, strategy, callback)
    for thread in callback.threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not [e for e in callback.errors if isinstance(e, AssertionError)], "nothing was killed"
    assert [summary.step for summary in result.history] == [*range(1, STEPS + 1)]
    assert result.checkpoint is not None and cluster.alive("") == ["driver"]


STOP_RACES: dict[str, tuple[Action, ...]] = {
    "two stops": (stop, stop),
    "a scale": (stop, scale(3)),
    "a loss": (lose("worker-1", stop),),
}


@pytest.mark.timeout(90)
@pytest.mark.sweep(2)
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
@pytest.mark.parametrize("race", STOP_RACES)
def test_stop_wins_against_concurrent_requests(
    cluster: InMemoryRay, tmp_path: Path, race: str, strategy: str
) -> None:
    with pytest.raises(Interrupted):
        fit(cluster, tmp_path, strategy, ActAtStep(cluster, 5, STOP_RACES[race]), LONG)
    assert '"STOPPED"' in next(tmp_path.glob("*/result.json")).read_text()
    assert cluster.alive("") == ["driver"]


@pytest.mark.timeout(90)
def test_stop_keeps_checkpoint_that_is_being_written(
    cluster: InMemoryRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, has_started = Disk.write, threading.Event()

    def write_slowly(disk: Disk, path: Path, content: FileContent) -> tuple[int, str]:
        has_started.set()
        time.sleep(0.2)
        return write(disk, path, content)

    def stop_during_write(ray: InMemoryRay) -> None:
        assert has_started.wait(30)
        stop(ray)

    monkeypatch.setattr(Disk, "write", write_slowly)
    with pytest.raises(Interrupted):
        fit(cluster, tmp_path, "ps-sync", ActAtStep(cluster, 1, (stop_during_write,)), LONG)
    names = {path.name for path in tmp_path.glob("*/checkpoints/*")}
    assert names and all(name.startswith("step-") and "." not in name for name in names)
