"""
Recovery time after the kill of a worker: from SIGKILL to the next step of all ranks.

distplat: `ring`, where survivors keep their state and one worker is replaced, or with
`failure.spare_workers` by a spare. Peer: TorchTrainer with
`FailureConfig(max_failures=...)`, which ends all workers and restarts them from the last
checkpoint; here there is no checkpoint, so only the restart is measured. Both train an MLP of
10.5 M parameters; the killed worker records the time of its death, all record their losses.
"""

import argparse
import os
import signal
import statistics
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from common import WORKERS, print_ratio
from ring_step import BATCH, mlp, samples
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat import Task, Trainer

KILL_AT, AFTER = 150, 10
"""Step of the kill, late enough for a spare to be ready, as in a long run."""
GOALS = {"a new process": 2.5, "a spare": 1.0}
"""Seconds."""


def note(folder: str, step: int) -> None:
    """Kill the first process that reaches `KILL_AT`; otherwise record the time of the step."""
    if step == KILL_AT and not Path(folder, "death").exists():
        with suppress(FileExistsError), Path(folder, "chosen").open("x"):
            Path(folder, "death").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
    with Path(folder, f"process-{os.getpid()}").open("a") as file:
        file.write(f"{time.time()}\n")


def standstill(folder: str) -> float:
    """Return the seconds from the death to the first step on both ranks."""
    death = float(Path(folder, "death").read_text())
    seen = [[float(line) for line in path.read_text().split()] for path in _files(folder)]
    after = [sorted(t for t in times if t > death) for times in seen]
    going_on = [times for times in after if len(times) > 1]  # one that was ended may have one
    assert len(going_on) == WORKERS, "each worker trains on"
    # The second loss after the death: for that, a whole step was made by all.
    return max(times[1] for times in going_on) - death


def _files(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("process-*"))


class Dying(Task):
    """A task that kills a worker once."""

    def __init__(self, folder: str) -> None:
        self.folder, self.steps = folder, 0

    def model(self) -> nn.Module:
        return mlp()

    def train_data(self) -> Dataset[Any]:
        return samples(KILL_AT + AFTER)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        note(self.folder, self.steps)
        self.steps += 1
        return nn.functional.mse_loss(outputs, targets)


def ours(spare: bool = False) -> float:
    """Kill a worker of distplat; return the recovery time in seconds."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        job = {
            "name": "bench",
            "strategy": "ring",
            "scaling": {"num_workers": WORKERS},
            "optimizer": {"name": "SGD", "lr": 1e-3},
            "task_args": {"folder": folder},
            "global_batch_size": BATCH,
            "steps": KILL_AT + AFTER,
            "storage_path": runs,
            "checkpoint": {"save_final": False},
            "failure": {"spare_workers": spare},
        }
        Trainer(job, Dying, progress=False).fit()
        return standstill(folder)


def train_loop(config: dict[str, Any]) -> None:
    """Train function for Ray Train."""
    import ray.train.torch
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    model = ray.train.torch.prepare_model(mlp())
    loader = DataLoader(samples(KILL_AT + AFTER), batch_size=BATCH // WORKERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step, (inputs, targets) in enumerate(ray.train.torch.prepare_data_loader(loader)):
        outputs = model(inputs)
        note(config["folder"], step)
        loss = nn.functional.mse_loss(outputs, targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def peer() -> float:
    """Kill a worker of Ray Train; return the recovery time in seconds."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        TorchTrainer(
            train_loop,
            train_loop_config={"folder": folder},
            scaling_config=ScalingConfig(num_workers=WORKERS),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(storage_path=runs, failure_config=FailureConfig(max_failures=2)),
        ).fit()
        return standstill(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        logging_level="error",
        log_to_driver=False,
    )
    rows = [(ours(), ours(spare=True), peer()) for _ in range(args.rounds)]
    *mine, other = (statistics.median(column) for column in zip(*rows, strict=True))
    for (name, goal), seconds in zip(GOALS.items(), mine, strict=True):
        print_ratio(f"killed worker, {name}", seconds, other, 1.0, unit="s ")
        reached = "reached" if seconds <= goal else "missed"
        print(f"  {seconds:.2f} s, goal <= {goal} s {reached}")
    ray.shutdown()


if __name__ == "__main__":
    main()
