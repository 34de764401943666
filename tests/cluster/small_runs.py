"""Small jobs, their runs, and the comparison of models."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from jobs import fields_of
from numpy.typing import NDArray
from safetensors.numpy import load_file

from distplat import Callback, Result, Trainer
from distplat.platform.progress import FailureEvent, Recovery, StepSummary

HERE = Path(__file__).parent
FAILURE = {"step_timeout_s": 30, "heartbeat_timeout_s": 20}
"""Deadlines within which a run detects a loss during a test."""


def job(strategy: Any, workers: int, **more: Any) -> dict[str, Any]:
    """Return the fields of a small job; `more` replaces fields."""
    fields = {
        "name": "small",
        "task": "tasks_for_tests:Blobs",
        "scaling": {"num_workers": workers, "resources_per_worker": {"CPU": 0.5}},
        "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
        "global_batch_size": 8,
        "epochs": 3,
        **more,
    }
    return fields_of(strategy, **fields)


def train(spec: dict[str, Any], storage: Path, **more: Any) -> Result:
    """Run a job to the end."""
    return Trainer({**spec, "storage_path": str(storage)}, working_dir=HERE, **more).fit()


def weights(result: Result) -> NDArray[np.float32]:
    """Return the trained model as one vector, tensors in the order of their names."""
    assert result.checkpoint is not None
    state = load_file(result.checkpoint)
    return np.concatenate([state[name].ravel() for name in sorted(state)])


def distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the relative distance of two vectors."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class BesideTraining(Callback, threading.Thread):
    """A `Callback` whose thread starts with the run; `run` should wait for `training`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.training = threading.Event()  #: set by the first step
        self.run_name = ""

    def on_start(self, job: object, run: str, path: Path) -> None:
        self.run_name = run
        self.start()

    def on_step(self, step: StepSummary) -> None:
        self.training.set()


class FailureRecorder(Callback):
    """Records the failures and recoveries of a run. A `Callback`."""

    def __init__(self) -> None:
        self.failures: list[FailureEvent] = []
        self.recoveries: list[Recovery] = []

    def on_failure(self, failure: FailureEvent) -> None:
        self.failures.append(failure)

    def on_recovery(self, recovery: Recovery) -> None:
        self.recoveries.append(recovery)
