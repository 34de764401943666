"""
Recovery time after the kill of a server node: from SIGKILL to the next complete step.

`ps-sync` with `replication: 2` trains an MLP of 10.5 M parameters on two workers; the primary of
the shard is killed from outside, and its backup takes over. There is no peer: Ray Train has no
parameter server, and Ray's documented example fails with its server. Goal: 0.6 s.
"""

import argparse
import os
import signal
import statistics
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from common import WORKERS, print_ratio
from ring_step import BATCH, mlp, samples
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat import Callback, Task, Trainer
from distplat.platform.progress import StepSummary

STEPS = 40
GOAL_S = 0.6
KILL_AFTER = 5
"""Steps; in the first one the loss is computed several times, for checks."""


class Noting(Task):
    """Records the time of each loss."""

    def __init__(self, folder: str) -> None:
        name = str(ray.get_runtime_context().get_actor_name())
        self.file = Path(folder, name.split("/")[1])

    def model(self) -> nn.Module:
        return mlp()

    def train_data(self) -> Dataset[Any]:
        return samples(STEPS)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        with self.file.open("a") as file:
            file.write(f"{time.time()}\n")
        return nn.functional.mse_loss(outputs, targets)


class Killer(Callback, threading.Thread):
    """Callback that kills the primary of shard 0 some steps after its backup is ready."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.training = threading.Event()
        self.killed_at = 0.0

    def on_start(self, job: object, run: str, path: Path) -> None:
        self.run_name = run
        self.start()

    def on_step(self, step: StepSummary) -> None:
        if step.step >= KILL_AFTER:
            self.training.set()

    def run(self) -> None:
        self.training.wait(120)
        manager = ray.get_actor("bench/server-manager", namespace=self.run_name)
        while not ray.get(manager.assignments.remote(), timeout=60)[0].ready:
            time.sleep(0.05)
        address = ray.get(manager.follow.remote(0, 0, 0, 1.0), timeout=60).parameters[0]
        self.killed_at = time.time()
        os.kill(address.pid, signal.SIGKILL)


def standstill() -> float:
    """Kill a server; return the seconds until both workers have completed another step."""
    killer = Killer()
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        job = {
            "name": "bench",
            "strategy": {"name": "ps-sync", "replication": 2},
            "scaling": {"num_workers": WORKERS},
            "optimizer": {"name": "SGD", "lr": 1e-3, "momentum": 0.9},
            "task_args": {"folder": folder},
            "global_batch_size": BATCH,
            "steps": STEPS,
            "storage_path": runs,
            "checkpoint": {"save_final": False},
        }
        Trainer(job, Noting, callbacks=(killer,), progress=False).fit()
        found = []
        for rank in range(WORKERS):
            times = [float(line) for line in Path(folder, f"worker-{rank}").read_text().split()]
            # The second loss after the death: for that, a whole step was made by all.
            found.append([at for at in times if at > killer.killed_at][1])
        return max(found) - killer.killed_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        logging_level="error",
        log_to_driver=False,
    )
    found = [standstill() for _ in range(args.rounds)]
    print(f"standstills: {', '.join(f'{seconds:.2f} s' for seconds in found)}")
    print_ratio("after a killed server, goal", statistics.median(found), GOAL_S, 1.0, unit="s ")
    ray.shutdown()


if __name__ == "__main__":
    main()
