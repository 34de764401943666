"""The engine of `distplat verify` in memory: N ranks as threads."""

from collections.abc import Callable
from typing import Any

import torch
from local_run import LocalRun, train
from torch import Tensor

from distplat.platform.progress import StepReport
from distplat.platform.spec import Job
from distplat.platform.tensor_slices import RawTensor
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.task import Task
from distplat.strategies.verification.recipes import Trained
from distplat.strategies.verification.switched import Switches, switched
from distplat.strategies.verification.verdicts import Engine, EngineRun


def engine(task_type: type[Task]) -> Engine:
    """Return an engine that trains a task in memory."""

    def run(job: Job, switches: Switches) -> EngineRun:
        return EngineRun(to_trained(job, train(job, switched(task_type, switches))))

    return run


def task_factory(task_type: type[Task], **arguments: Any) -> Callable[[Switches], Task]:
    """Return a function that creates the task with switches."""
    return lambda switches: switched(task_type, switches)(**arguments)


def to_trained(job: Job, run: LocalRun) -> Trained:
    """Convert a run with checkpoints after every step to the form of a reference."""
    states = {step: model_of(saved) for step, saved in run.checkpoints.items()}
    sums, counts = [0.0] * (job.steps or 0), [0.0] * (job.steps or 0)
    for report in (report for reports in run.reports for report in reports):
        if isinstance(report, StepReport):
            weight = report.samples if report.weight is None else report.weight
            sums[report.step] += report.loss * weight
            counts[report.step] += weight
    return Trained(states, [total / count for total, count in zip(sums, counts, strict=True)])


def model_of(saved: SavedState) -> dict[str, Tensor]:
    """Return a checkpoint's model as tensors."""
    return {name: _tensor(raw) for name, raw in saved._load("model").items()}


def _tensor(raw: RawTensor) -> Tensor:
    dtype = getattr(torch, raw.dtype)
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).view(raw.shape).clone()
