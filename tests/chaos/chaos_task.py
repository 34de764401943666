"""
The task of the fault grid: it reports when it reaches a moment, and waits there for the fault.

`moments` lists the moments to report to the injector (`chaos_injector.py`). At a moment the task
creates the file `ask-<number>`, and may wait for the file `done-<number>`, whose content is the
action of the task, if any. After the action it writes the shift of its clock to `acted-<number>`.
"""

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task

SAMPLES = 48
HOLD_TIMEOUT_S = 30.0
now = time.time  # not affected by `jump`


class Watched(Task):
    """
    A small classifier with batch norm and dropout.

    Args:
        folder: for files exchanged by injector and task.
        moments: name, rank, step, and whether to wait there; see `PlannedFault.request`.
        width: of the layers; a wide model has long exchanges and checkpoints.
        pause: minimum duration of each forward, in seconds.
        per_step: forwards of a rank in one step.
        stateful: whether layers have buffers, which a lost worker of `ps-async` resets.
    """

    def __init__(
        self,
        folder: str = "",
        moments: list[list[Any]] | None = None,
        width: int = 16,
        pause: float = 0.02,
        per_step: int = 1,
        stateful: bool = True,
    ) -> None:
        self.folder, self.moments, self.width = folder, moments or [], width
        self.pause, self.per_step, self.stateful = pause, per_step, stateful
        name = str(ray.get_runtime_context().get_actor_name()) if ray.is_initialized() else ""
        self.worker = name.split("/")[1] if folder and "/worker-" in name else ""
        self.renewed = "attempt" in name
        if self.worker:
            write_file(
                self.folder, self.worker, f"{os.getpid()} {os.readlink('/proc/self/ns/pid')}"
            )

    def model(self) -> nn.Module:
        self.reach("renewed" if self.renewed else "model")
        width = self.width
        layers = [nn.Linear(5, width), Block(self, width), nn.Linear(width, width)]
        return nn.Sequential(*layers, Block(self, width), nn.Linear(width, 3))

    def train_data(self) -> Dataset[Any]:
        if not self.renewed:
            self.reach("data")
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 5, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 3, (SAMPLES,), generator=generator))

    def eval_data(self) -> Dataset[Any] | None:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def reach(self, moment: str, step: int = 0) -> None:
        """Report a moment once, and run the requested action."""
        for number, (name, rank, first_step, hold) in enumerate(self.moments):
            if (name, f"worker-{rank}") != (moment, self.worker) or step < first_step:
                continue
            if not create_marker(self.folder, f"reached-{number}"):
                continue
            write_file(self.folder, f"ask-{number}", self.worker)
            if hold:
                act(wait_for_answer(Path(self.folder, f"done-{number}")))
                write_file(self.folder, f"acted-{number}", f"{time.time() - now()}")

    def count(self) -> None:
        """Append the time of a forward to a file, for the recovery time."""
        if self.worker:
            with Path(self.folder, f"steps-{self.worker}").open("a") as file:
                file.write(f"{now()}\n")


class Block(nn.Module):
    """Layers with state; report each forward and backward in training."""

    def __init__(self, task: Watched, width: int) -> None:
        super().__init__()
        self.task = task
        norm = nn.BatchNorm1d(width) if task.stateful else nn.LayerNorm(width)
        self.parts = nn.Sequential(norm, nn.Tanh(), nn.Dropout(0.1))
        forwards = torch.zeros((), dtype=torch.int64)
        if task.stateful:  # a replacement continues the count
            self.register_buffer("forwards", forwards)
        else:
            self.forwards = forwards

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.parts(inputs)
        if not self.training:
            self.task.reach("evaluation")
            return outputs
        forwards = int(self.forwards)
        step = forwards // self.task.per_step
        self.forwards.add_(1)
        self.task.count()
        self.task.reach("forward", step)
        time.sleep(self.task.pause)
        self.task.reach("between", forwards)
        if outputs.requires_grad:
            outputs.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self.task.reach("backward", step)
            )
        return outputs


def write_file(folder: str, name: str, content: str) -> None:
    """Write a file atomically."""
    part = Path(folder, f".{name}-{os.getpid()}")
    part.write_text(content)
    part.rename(Path(folder, name))


def create_marker(folder: str, name: str) -> bool:
    """Create a file; return False if another process has created it."""
    try:
        os.close(os.open(Path(folder, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def wait_for_answer(path: Path) -> str:
    """Wait for the injector's answer, and return it."""
    deadline = time.monotonic() + HOLD_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.002)
    return path.read_text()


def act(fault: str) -> None:
    """Simulate user code that fails."""
    if fault == "raise":
        raise KeyError("no such token: 17")
    if fault == "exit":
        sys.exit(0)
    if fault == "quit":
        os._exit(0)
    if fault == "segfault":
        ctypes.string_at(0)
    if fault == "loop":
        time.sleep(3600)
    if fault == "clock":
        jump(3600.0)


def jump(seconds: float) -> None:
    """Shift this process's `time.time`."""
    original = time.time
    time.time = lambda: original() + seconds
