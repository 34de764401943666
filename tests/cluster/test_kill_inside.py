"""Kills at random moments inside an all-reduce of 64 MB do not change the model."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import HERE, job, train, weights

from distplat import Callback, Result
from distplat.platform.progress import Recovery, StepSummary
from distplat.strategies.catalog import strategies

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(400)]

KILLS = int(os.environ.get("DISTPLAT_KILLS", "5"))
"""`make test-all` kills twenty times."""
WORLD, STEPS = 2, 30 + 6 * KILLS


class Killer(Callback, threading.Thread):
    """Kills a random rank inside an exchange, waits for the recovery, and repeats."""

    def __init__(self, folder: Path, kills: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.kills = folder, kills
        self.inside = self.outside = 0
        self.has_started = False
        self.working = threading.Event()
        self.over = threading.Event()
        self.random = random.Random(17)

    def on_start(self, job: object, run: str, path: Path) -> None:
        self.start()

    def on_step(self, step: StepSummary) -> None:
        if not self.has_started:
            self.has_started = True
            self.working.set()

    def on_recovery(self, recovery: Recovery) -> None:
        self.working.set()

    def run(self) -> None:
        while self.inside < self.kills and self.working.wait(60) and not self.over.is_set():
            self.working.clear()
            self._kill(self.random.randrange(WORLD))

    def _kill(self, rank: int) -> None:
        """Wait until the rank enters an exchange, sleep for a part of its duration, and kill it."""
        entered = self._wait_for_exchange(rank)
        if entered is None:
            return
        pid, step = entered
        time.sleep(self.random.uniform(0, self.exchange_s))
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        if self._read(rank) == (pid, step):
            self.inside += 1
        else:
            self.outside += 1

    def _wait_for_exchange(self, rank: int) -> tuple[int, int] | None:
        first = self._read(rank)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not self.over.is_set():
            now = self._read(rank)
            if now is not None and now != first:
                return now
            time.sleep(0.0005)
        return None

    def _read(self, rank: int) -> tuple[int, int] | None:
        """Return (pid, step) while the rank exchanges."""
        path = self.folder / str(rank)
        words = path.read_text().split() if path.exists() else []
        return (int(words[0]), int(words[2])) if len(words) == 3 else None

    exchange_s = 0.03
    """Approximate duration of an exchange in seconds; kills are spread over it."""


def run(folder: Path, tmp_path: Path, killer: Killer | None) -> Result:
    folder.mkdir()
    spec = job(
        {"name": "marked-ring", "folder": str(folder), "timeout_s": 20},
        WORLD,
        task="tasks_for_tests:Vast",
        epochs=None,
        steps=STEPS,
        optimizer={"name": "SGD", "lr": 0.1, "momentum": 0.9},
        failure={"max_failures": 4 * KILLS},
    )
    callbacks = () if killer is None else (killer,)
    return train(spec, tmp_path, callbacks=callbacks, strategy_file=HERE / "marked_ring.py")


@pytest.mark.slow
def test_kills_inside_an_all_reduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The strategy file registers in this process, too; later tests must not find it.
    monkeypatch.setattr(strategies, "_items", dict(strategies._items))
    unfailed = run(tmp_path / "calm", tmp_path, None)
    killer = Killer(tmp_path / "marks", KILLS)
    exchange = sorted(s.seconds["exchange"] for s in unfailed.history)
    killer.exchange_s = exchange[STEPS // 2]
    result = run(tmp_path / "marks", tmp_path, killer)
    killer.over.set()
    killer.join(60)
    assert killer.inside == KILLS, f"{killer.inside} inside, {killer.outside} outside"
    assert len(result.failures) == killer.inside + killer.outside
    assert np.array_equal(weights(result), weights(unfailed))
    assert [s.step for s in result.history] == list(range(1, STEPS + 1))
