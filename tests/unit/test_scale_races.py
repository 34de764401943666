"""Requests that meet each other or a loss: each step is made once, or the run was stopped."""

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
    """Its steps take so long that requests meet them."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().loss(outputs, targets)


Deed = Callable[[InMemoryRay], object]


class At(Callback):
    """Lets deeds begin, side by side, once a step is told."""

    def __init__(self, ray: InMemoryRay, step: int, deeds: tuple[Deed, ...]) -> None:
        self.step = step
        self.errors: list[Exception] = []
        self.threads = [
            threading.Thread(target=self._do, args=(ray, deed), daemon=True) for deed in deeds
        ]

    def on_step(self, step: StepSummary) -> None:
        if step.step == self.step:
            for thread in self.threads:
                thread.start()

    def _do(self, ray: InMemoryRay, deed: Deed) -> None:
        try:
            deed(ray)
        except Exception as error:  # the run may be over
            self.errors.append(error)


def scale(workers: int) -> Deed:
    return lambda ray: ray.ask("controller", "scale", workers)


def stop(ray: InMemoryRay) -> Any:
    return ray.ask("controller", "stop", 5.0)


def lose(role: str, then: Deed) -> Deed:
    def do(ray: InMemoryRay) -> None:
        assert ray.kill_process(role)
        then(ray)

    return do


@pytest.fixture
def cluster() -> Iterator[InMemoryRay]:
    with InMemoryRay() as ray:
        KillsInForward.ray, KillsInForward.killed = ray, ""
        yield ray


def fit(ray: InMemoryRay, folder: Path, strategy: str, at: At, steps: int = STEPS) -> Result:
    fields = fields_of(
        strategy, 2, steps=steps, checkpoint={"every_steps": 4}, storage_path=str(folder)
    )
    trainer = Trainer(fields, Slow, callbacks=[at], progress=False, log_to_driver=False)
    found: Result = ray.as_driver(trainer.fit)
    return found


MEETINGS: dict[str, tuple[int, tuple[Deed, ...]]] = {
    "three at once": (4, (scale(3), scale(1), scale(4))),
    "as many as there are": (4, (scale(2), scale(2))),
    "the last step": (STEPS - 1, (scale(3),)),
    "a worker is replaced": (4, (lose("worker-1", scale(3)),)),
    "a server is lost": (5, (lose("server-0", scale(3)),)),
    "the scheduler is replaced": (4, (lose("task-scheduler", scale(1)),)),
}


@pytest.mark.timeout(90)
@pytest.mark.sweep(3)
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
@pytest.mark.parametrize("meeting", MEETINGS)
def test_every_step_is_made_once_whoever_asks_for_more_or_fewer(
    cluster: InMemoryRay, tmp_path: Path, meeting: str, strategy: str
) -> None:
    step, deeds = MEETINGS[meeting]
    result = fit(cluster, tmp_path, strategy, At(cluster, step, deeds))
    assert [one.step for one in result.history] == [*range(1, STEPS + 1)]
    assert result.checkpoint is not None and cluster.living("") == ["driver"]


STOPS: dict[str, tuple[Deed, ...]] = {
    "two stops": (stop, stop),
    "a scale": (stop, scale(3)),
    "a loss": (lose("worker-1", stop),),
}


@pytest.mark.timeout(90)
@pytest.mark.sweep(2)
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
@pytest.mark.parametrize("meeting", STOPS)
def test_a_run_that_is_stopped_is_stopped_whatever_else_is_asked(
    cluster: InMemoryRay, tmp_path: Path, meeting: str, strategy: str
) -> None:
    with pytest.raises(Interrupted):
        fit(cluster, tmp_path, strategy, At(cluster, 5, STOPS[meeting]), LONG)
    assert '"STOPPED"' in next(tmp_path.glob("*/result.json")).read_text()
    assert cluster.living("") == ["driver"]


@pytest.mark.timeout(90)
def test_a_checkpoint_that_is_being_written_is_kept_by_a_stop(
    cluster: InMemoryRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun = Disk.write, threading.Event()

    def slowly(disk: Disk, path: Path, content: FileContent) -> tuple[int, str]:
        begun.set()
        time.sleep(0.2)
        return write(disk, path, content)

    def in_the_middle(ray: InMemoryRay) -> None:
        assert begun.wait(30)
        stop(ray)

    monkeypatch.setattr(Disk, "write", slowly)
    with pytest.raises(Interrupted):
        fit(cluster, tmp_path, "ps-sync", At(cluster, 1, (in_the_middle,)), LONG)
    kept = {path.name for path in tmp_path.glob("*/checkpoints/*")}
    assert kept and all(name.startswith("step-") and "." not in name for name in kept)
