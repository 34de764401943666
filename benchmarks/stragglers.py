"""
Effect of one worker that is five times slower on the speed of the others.

The steps of three workers are pauses of fixed length, so that the result does not depend on cores.
Each strategy runs once with equal workers and once with one that pauses five times as long; the
result is the speed of the fastest other worker in the second run, relative to the first.
Synchronous workers drop to about a fifth by definition; asynchronous ones should keep at least 90
%.
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task, Trainer

WORLD, SLOWED, WARM = 3, 5.0, 5
STRATEGIES: list[dict[str, Any]] = [
    {"name": "ps-sync"},
    {"name": "ps-sync", "backup_workers": 1},
    {"name": "ps-async"},
    {"name": "ps-async", "staleness": 4},
]
GOALS = {"ps-async": 0.9}


class Paced(Task):
    """A task whose step is a pause, which is longer on the slow rank."""

    def __init__(self, pause_s: float, slowed: float, folder: str) -> None:
        name = str(ray.get_runtime_context().get_actor_name())
        self.rank = int(name.split("/")[1].split("-")[1])
        self.pause_s = pause_s * (slowed if self.rank == WORLD - 1 else 1.0)
        self.file = Path(folder, str(self.rank))
        self.times: list[float] = []

    def model(self) -> nn.Module:
        return nn.Linear(64, 64)

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(torch.ones(60, 64), torch.ones(60, 64))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(self.pause_s)
        self.times.append(time.perf_counter())
        gaps = [b - a for a, b in zip(self.times[WARM:], self.times[WARM + 1 :], strict=False)]
        self.file.write_text(str(statistics.median(gaps) if gaps else 0.0))
        return nn.functional.mse_loss(outputs, targets)


def step_s(strategy: dict[str, Any], pause_s: float, slowed: float, steps: int) -> float:
    """Return the median step time of the other ranks."""
    with TemporaryDirectory() as folder:
        job = {
            "name": "stragglers",
            "strategy": strategy,
            "scaling": {"num_workers": WORLD, "resources_per_worker": {"CPU": 0.1}},
            "optimizer": {"name": "SGD", "lr": 1e-4},
            "global_batch_size": 6,
            "steps": steps,
            "storage_path": folder,
        }
        task_args = {"pause_s": pause_s, "slowed": slowed, "folder": folder}
        Trainer({**job, "task_args": task_args}, Paced, progress=False).fit()
        return statistics.median(float(Path(folder, str(r)).read_text()) for r in range(WORLD - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pause-ms", type=float, default=40.0)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=8,
        logging_level="warning",
        log_to_driver=False,
    )
    for strategy in STRATEGIES:
        equal, slowed = (
            step_s(strategy, args.pause_ms / 1e3, factor, args.steps) for factor in (1.0, SLOWED)
        )
        what = " ".join(
            str(value) if key == "name" else f"{key}={value}" for key, value in strategy.items()
        )
        kept = equal / slowed
        goal = GOALS.get(strategy["name"]) if "staleness" not in strategy else None
        verdict = (
            ""
            if goal is None
            else f"   goal >= {goal:.0%} " + ("reached" if kept >= goal else "missed")
        )
        print(
            f"{what:<28} step {equal * 1e3:6.1f} ms, beside a slow worker {slowed * 1e3:6.1f} ms: "
            f"the others keep {kept:4.0%}{verdict}",
            flush=True,
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
